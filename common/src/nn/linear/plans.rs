//! A layer's plans, in pairs: one takes all products, the other one leaves out those with zeros. It depends on the data which of
//! them is faster, and nothing else does.

use crate::kernel::contraction::{
    BlockedReduce, Gather, GatherOperands, Reduce, ReduceOperands, Scatter, SparseReduce,
};
use crate::kernel::{ChainElement, Element, Isa};
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

    pub(super) fn run<E: ChainElement>(
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

    /// Takes all products.
    pub(super) fn run_all<E: Element>(&self, samples: usize, operands: GatherOperands<'_, E>) {
        let packed = &operands.packed[..self.all.packed_len()];
        self.all.run(samples, GatherOperands { packed, ..operands });
    }
}

/// Plans that sum over pixels of both images.
#[derive(Debug)]
pub(super) enum WeightGradient {
    /// Product by product.
    Products(ProductReduce),
    /// In blocks of products.
    Blocks(BlockedReduce),
}

impl WeightGradient {
    pub(super) fn scratch_len(&self, samples: usize) -> usize {
        match self {
            Self::Products(plan) => plan.scratch_len(samples),
            Self::Blocks(plan) => plan.scratch_len(samples),
        }
    }
}

/// Plans that sum product by product.
#[derive(Debug)]
pub(super) struct ProductReduce {
    all: Reduce,
    /// Where the low image is mostly 0, as a rule.
    sparse: Option<SparseReduce>,
}

impl ProductReduce {
    pub(super) fn new(all: Reduce, sparse: Option<SparseReduce>) -> Self {
        Self { all, sparse }
    }

    fn scratch_len(&self, samples: usize) -> usize {
        self.all.scratch_len(samples).max(self.sparse.as_ref().map_or(0, SparseReduce::scratch_len))
    }

    pub(super) fn run<E: ChainElement>(
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
