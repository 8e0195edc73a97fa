//! What training minimises.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::kernel::{Isa, elementwise};

/// A loss: the mean over a sample's elements, then the mean over samples; Keras' meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Mean squared error.
    #[default]
    Mse,
    /// Binary cross-entropy of values in 0..1 against predicted probabilities.
    BinaryCrossentropy,
}

impl Loss {
    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mse => "mse",
            Self::BinaryCrossentropy => "binary_crossentropy",
        }
    }

    /// The loss of one sample times its number of elements; `gradient` becomes the derivative of the sample's loss by
    /// `y`, or by the input of the sigmoid that made `y` if `by_logit` (binary cross-entropy only).
    pub(crate) fn sample(self, isa: Isa, y: &[f32], t: &[f32], by_logit: bool, gradient: &mut [f32]) -> f64 {
        let elements = y.len() as f32;
        match self {
            // d/dy mean (y - t)^2 = 2 (y - t) / n
            Self::Mse => elementwise::squared_error(isa, y, t, 2.0 / elements, gradient),
            Self::BinaryCrossentropy => {
                elementwise::binary_cross_entropy(isa, y, t, 1.0 / elements, by_logit, gradient)
            }
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
