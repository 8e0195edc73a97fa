//! Where it is worth it to look for zeros and to leave out their products.
//!
//! Nothing here changes a bit of a result: see the module `combination` of the kernels.

use super::op::Op;
use crate::kernel::{Element, Isa, survey};
use crate::model::{Activation, LayerSpec, PoolSpec, ResolvedLayer};

/// Elements of a window from which on what a max pooling lets through is little.
const MIN_WINDOW: usize = 4;

/// What is mostly 0, as a rule, at a layer with weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sparsity {
    /// Its input: a relu made it.
    pub(super) input: bool,
    /// The loss' derivative by its output: a max pooling lets gradients through to one element of each of its windows.
    pub(super) delta: bool,
}

impl Sparsity {
    /// What is to be expected at a layer by what comes before and after it.
    pub(super) fn between(before: Option<&Op>, after: Option<&ResolvedLayer>) -> Self {
        let lets_little_through = |pool: &PoolSpec| {
            let (window, strides) = (pool.pool_size, pool.strides.unwrap_or(pool.pool_size));
            let apart = strides.rows >= window.rows && strides.columns >= window.columns;
            apart && window.rows * window.columns >= MIN_WINDOW
        };
        Self {
            input: before.is_some_and(|op| op.activation() == Activation::Relu),
            delta: after
                .is_some_and(|layer| matches!(&layer.spec, LayerSpec::MaxPool2d(pool) if lets_little_through(pool))),
        }
    }
}

/// What is done about products with a factor 0. It changes no bit of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroProducts {
    /// Where one operand is mostly 0, they are left out if that is faster.
    #[default]
    AsIsFaster,
    /// Where one operand is mostly 0 as a rule, they are left out.
    LeftOut,
    /// All products are taken.
    Taken,
}

impl ZeroProducts {
    /// Whether products with zeros of `elements` are left out, where that is faster as long as no more than the share `most` of
    /// them is not 0.
    pub(super) fn are_left_out<E: Element>(self, isa: Isa, elements: &[E], most: f32) -> bool {
        match self {
            Self::AsIsFaster => survey::nonzero_share(isa, elements) <= most,
            Self::LeftOut => true,
            Self::Taken => false,
        }
    }
}
