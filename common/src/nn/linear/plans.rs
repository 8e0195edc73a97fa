//! A layer's plans, in pairs: one takes all products, the other one leaves out those with zeros. It depends on the data which of
//! them is faster, and nothing else does.

use crate::kernel::contraction::{Gather, GatherOperands, Reduce, ReduceOperands, Scatter, SparseReduce};
use crate::kernel::{Element, Isa};
use crate::nn::sparsity::ZeroProducts;

/// The share of elements that are not 0 up to which lists of them are faster than all products, in whole runs on an Intel core and a
/// Zen 4.
const MOST_NONZERO: f32 = 0.6;

/// Plans that compute one image from the other. Their packed weights lie one behind the other.
#[derive(Debug)]
pub(super) struct Map {
    all: Gather,
    /// From a low image that is mostly 0, as a rule.
    sparse: Option<Scatter>,
}

impl Map {
    pub(super) fn new(all: Gather, sparse: Option<Scatter>) -> Self {
        Self { all, sparse }
    }

    pub(super) fn packed_len(&self) -> usize {
        self.all.packed_len() + self.sparse.as_ref().map_or(0, Scatter::packed_len)
    }

    pub(super) fn scratch_len(&self) -> usize {
        self.all.scratch_len().max(self.sparse.as_ref().map_or(0, Scatter::scratch_len))
    }

    pub(super) fn pack<E: Element>(&self, weights: &[E], packed: &mut [E]) {
        let (of_all, of_sparse) = packed.split_at_mut(self.all.packed_len());
        self.all.pack(weights, of_all);
        if let Some(sparse) = &self.sparse {
            sparse.pack(weights, of_sparse);
        }
    }

    pub(super) fn run<E: Element>(
        &self,
        (isa, zero_products): (Isa, ZeroProducts),
        samples: usize,
        operands: GatherOperands<'_, E>,
    ) {
        let (of_all, of_sparse) = operands.packed.split_at(self.all.packed_len());
        match &self.sparse {
            Some(sparse) if zero_products.are_left_out(isa, operands.input, MOST_NONZERO) => {
                sparse.run(samples, GatherOperands { packed: of_sparse, ..operands });
            }
            _ => self.all.run(samples, GatherOperands { packed: of_all, ..operands }),
        }
    }
}

/// Plans that sum over pixels of both images.
#[derive(Debug)]
pub(super) struct WeightGradient {
    all: Reduce,
    /// Where the low image is mostly 0, as a rule.
    sparse: Option<SparseReduce>,
}

impl WeightGradient {
    pub(super) fn new(all: Reduce, sparse: Option<SparseReduce>) -> Self {
        Self { all, sparse }
    }

    pub(super) fn scratch_len(&self, samples: usize) -> usize {
        self.all.scratch_len(samples).max(self.sparse.as_ref().map_or(0, SparseReduce::scratch_len))
    }

    pub(super) fn run<E: Element>(
        &self,
        (isa, zero_products): (Isa, ZeroProducts),
        samples: usize,
        operands: ReduceOperands<'_, E>,
    ) {
        let ReduceOperands { high, low, gradient, accumulate, scratch } = operands;
        if let Some(sparse) = &self.sparse
            && zero_products.are_left_out(isa, low, MOST_NONZERO)
            && sparse.run(samples, ReduceOperands { high, low, gradient, accumulate, scratch })
        {
            return;
        }
        self.all.run(samples, ReduceOperands { high, low, gradient, accumulate, scratch });
    }
}
