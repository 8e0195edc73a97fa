//! The steps that a network's passes are made of.

use super::dense::DenseLayer;
use super::linear::{self, Linear};
use super::live::LiveSizes;
use crate::kernel::contraction::PixelRelation;
use crate::kernel::pooling::Windows;
use crate::model::{Activation, LayerSpec, Pair, ResolvedLayer};

/// A step of the passes. Layers that only rename axes are none.
#[derive(Debug)]
pub(super) enum Op {
    Linear(Box<Linear>),
    Dense(Box<DenseLayer>),
    MaxPool { windows: Windows, channels: usize },
    AveragePool { windows: Windows, channels: usize },
    UpSample { windows: Windows, channels: usize },
    Activate(Activation),
}

impl Op {
    /// Products of one sample's forward pass.
    pub(super) fn products(&self) -> usize {
        match self {
            Op::Linear(linear) => linear.products,
            Op::Dense(dense) => dense.products,
            _ => 0,
        }
    }

    /// Whether the op ends in a relu that it takes itself.
    pub(super) fn has_weights(&self) -> bool {
        matches!(self, Op::Linear(_) | Op::Dense(_))
    }

    /// The activation that ends the op.
    pub(super) fn activation(&self) -> Activation {
        match self {
            Op::Linear(linear) => linear.activation,
            Op::Dense(dense) => dense.activation,
            Op::Activate(activation) => *activation,
            _ => Activation::Linear,
        }
    }
}

/// The step of a layer without weights; `None` for a layer that only renames axes.
pub(super) fn unparametrised(layer: &ResolvedLayer, live: LiveSizes) -> Option<Op> {
    match &layer.spec {
        LayerSpec::Activation { activation } => Some(Op::Activate(*activation)),
        LayerSpec::MaxPool2d(pool) | LayerSpec::AveragePool2d(pool) => {
            let ((high, channels), (low, _)) = (linear::image(&layer.input)?, linear::image(&layer.output)?);
            let strides = pool.strides.unwrap_or(pool.pool_size);
            let relation = PixelRelation::with_padding(high, low, pool.pool_size, strides, pool.padding);
            let windows = Windows::new(&live.crop(relation, false));
            Some(match layer.spec {
                LayerSpec::MaxPool2d(_) => Op::MaxPool { windows, channels },
                _ => Op::AveragePool { windows, channels },
            })
        }
        LayerSpec::UpSampling2d { size } => {
            let ((low, channels), (high, _)) = (linear::image(&layer.input)?, linear::image(&layer.output)?);
            let padding = Pair::square(0);
            let relation = PixelRelation { high, low, kernel: *size, strides: *size, padding };
            Some(Op::UpSample { windows: Windows::new(&live.crop(relation, true)), channels })
        }
        _ => None,
    }
}
