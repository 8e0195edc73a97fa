//! What a run does when a loss or a gradient is not finite.

use serde::{Deserialize, Serialize};

/// What is done with a round whose loss or gradient is not finite. Its optimizer step is not taken in any case: the
/// parameters and the optimizer's moments stay as they were before the round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NonFiniteAction {
    /// The run fails. It can be resumed, before the round.
    #[default]
    Stop,
    /// The batch is left out, and the run goes on with the next one.
    Skip,
    /// The batch is left out, and the learning rate is lowered for good.
    LowerRate,
}

/// What a run does when a loss or a gradient is not finite. What is done depends on nothing but the round's sums, which
/// have the same bits for any number of workers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NonFiniteConfig {
    /// Stop, skip the batch, or skip it and lower the rate.
    pub action: NonFiniteAction,
    /// With `lower_rate`: what the learning rate is multiplied by, each time.
    pub rate_factor: f64,
    /// So many rounds may be skipped one after the other; at the next one the run fails.
    pub max_in_a_row: u32,
}

impl Default for NonFiniteConfig {
    fn default() -> Self {
        Self { action: NonFiniteAction::Stop, rate_factor: 0.5, max_in_a_row: 10 }
    }
}

impl NonFiniteConfig {
    /// What is wrong with the settings, if anything.
    pub(super) fn problem(&self) -> Option<String> {
        let Self { rate_factor, max_in_a_row, .. } = *self;
        if !(rate_factor > 0.0 && rate_factor < 1.0) {
            return Some(format!("non_finite.rate_factor is {rate_factor}; it must be above 0 and below 1"));
        }
        (max_in_a_row == 0).then(|| "non_finite.max_in_a_row is 0; it must be at least 1".to_owned())
    }

    /// The learning rate after it was lowered `cuts` times: one multiplication for each, so that a run that is resumed
    /// finds the same bits.
    pub fn rate_after(&self, learning_rate: f64, cuts: u32) -> f64 {
        (0..cuts).fold(learning_rate, |rate, _| rate * self.rate_factor)
    }
}
