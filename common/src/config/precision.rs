//! In which numbers a run computes.

use serde::{Deserialize, Serialize};

use crate::kernel::{Compute, Precision};

/// In which numbers a run computes. Parameters, sums, the optimizer and everything on disk are 32-bit floats in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionConfig {
    /// What product-sums are computed from: activations, weights and derivatives, rounded or not.
    pub compute: Compute,
    /// What the gradients of leaves and of the reduction tree's nodes, and the parameters that workers compute with, are
    /// rounded to: what workers send and get.
    pub wire: Precision,
}
