//! Which images are known to be mostly 0, whatever the data are.

use super::op::Op;
use crate::model::{Activation, LayerSpec, PoolSpec, ResolvedLayer};

/// Elements of a window from which on what a max pooling lets through is little.
const MIN_WINDOW: usize = 4;

/// What is mostly 0 at a layer with weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sparsity {
    /// Its input: a relu made it.
    pub(super) input: bool,
    /// The loss' derivative by its output: a max pooling lets gradients through to one element of each of its windows.
    pub(super) delta: bool,
}

impl Sparsity {
    /// What is known of a layer by what comes before and after it.
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
