//! Adam (Kingma and Ba, "Adam: a method for stochastic optimization", 2015), with Keras' defaults.
//!
//! With the mean gradient `g` of round `t` (from 1):
//!
//! ```text
//! m = m + (1 - beta_1) (g - m)
//! v = v + (1 - beta_2) (g^2 - v)
//! keras:    w = w - rate sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)
//! pytorch:  w = w - rate / (1 - beta_1^t) * m / (sqrt(v) / sqrt(1 - beta_2^t) + epsilon)
//! ```
//!
//! The two differ in where epsilon stands. With the small gradients of a mean squared error the difference shows in
//! the first few hundred rounds.
//!
//! A moment below 2^-100 is 0. At the default epsilon, its step would be below 2^-76 of the learning rate, which is lost in the
//! rounding of any parameter above 2^-51 of it, and the root of such a second moment is 2^-26 of epsilon. But denormal numbers,
//! which moments become some 700 rounds after their last gradient, are what processors are slow with.

use serde::{Deserialize, Serialize};

use crate::kernel::elementwise::{self, AdamSlices, AdamStep, SquareSum};
use crate::kernel::{AlignedFloats, Isa};

/// Where epsilon is added; see the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EpsilonForm {
    /// To the root of the uncorrected second moment ("epsilon hat" in the paper).
    #[default]
    Keras,
    /// To the root of the bias-corrected second moment.
    Pytorch,
}

/// Adam's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adam {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the running mean of gradients.
    pub beta_1: f64,
    /// Decay of the running mean of squared gradients.
    pub beta_2: f64,
    /// Keeps the denominator away from 0.
    pub epsilon: f64,
    /// Where epsilon is added.
    pub epsilon_form: EpsilonForm,
}

impl Default for Adam {
    /// Source: Keras 3, `keras.optimizers.Adam`.
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta_1: 0.9, beta_2: 0.999, epsilon: 1e-7, epsilon_form: EpsilonForm::Keras }
    }
}

impl Adam {
    /// What is wrong with the settings, if anything.
    pub fn problem(&self) -> Option<String> {
        let decay = |name: &str, beta: f64| {
            (!(0.0..1.0).contains(&beta)).then(|| format!("{name} is {beta}; it must be at least 0 and below 1"))
        };
        let positive = |name: &str, value: f64| {
            (!(value > 0.0 && value.is_finite())).then(|| format!("{name} is {value}; it must be above 0 and finite"))
        };
        positive("learning_rate", self.learning_rate)
            .or_else(|| positive("epsilon", self.epsilon))
            .or_else(|| decay("beta_1", self.beta_1))
            .or_else(|| decay("beta_2", self.beta_2))
    }

    /// The arithmetic of the step with number `t` (from 1) for a batch of `samples` samples.
    pub fn step(&self, t: u64, samples: u32) -> AdamStep {
        let correction_1 = 1.0 - power(self.beta_1, t);
        let root_correction_2 = (1.0 - power(self.beta_2, t)).sqrt();
        let (rate, root_scale) = match self.epsilon_form {
            EpsilonForm::Keras => (self.learning_rate * root_correction_2 / correction_1, 1.0),
            EpsilonForm::Pytorch => (self.learning_rate / correction_1, 1.0 / root_correction_2),
        };
        AdamStep {
            inverse_samples: 1.0 / samples as f32,
            one_minus_beta_1: (1.0 - self.beta_1) as f32,
            one_minus_beta_2: (1.0 - self.beta_2) as f32,
            root_scale: root_scale as f32,
            epsilon: self.epsilon as f32,
            rate: rate as f32,
        }
    }
}

/// Adam's running means, laid out like the parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Running mean of gradients.
    pub first: AlignedFloats,
    /// Running mean of squared gradients.
    pub second: AlignedFloats,
}

impl Moments {
    /// The moments before the first step.
    pub fn zero(parameters: usize) -> Self {
        Self { first: AlignedFloats::zeros(parameters), second: AlignedFloats::zeros(parameters) }
    }
}

/// Takes one step for a stretch of parameters, and adds the squares of its gradient sum to `squares`. All slices are equally
/// long.
pub fn apply(isa: Isa, step: AdamStep, slices: AdamSlices<'_>, squares: &mut SquareSum) {
    elementwise::adam(isa, step, slices, squares);
}

/// `base^exponent` by squaring, in `f64`: a library's `powi` may round differently on another machine.
fn power(base: f64, mut exponent: u64) -> f64 {
    let (mut result, mut square) = (1.0, base);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_step_moves_by_about_the_learning_rate() {
        for epsilon_form in [EpsilonForm::Keras, EpsilonForm::Pytorch] {
            let adam = Adam { epsilon_form, ..Adam::default() };
            let (mut m, mut v, mut updated) = ([0.0], [0.0], [0.0]);
            let slices = AdamSlices {
                parameters: &[1.0],
                gradient_sum: &[-8.0],
                first_moment: &mut m,
                second_moment: &mut v,
                updated: &mut updated,
            };
            apply(Isa::SCALAR, adam.step(1, 4), slices, &mut SquareSum::default());
            assert!((updated[0] - 1.001).abs() < 1e-6, "{updated:?}");
            assert!((m[0] + 0.2).abs() < 1e-7 && (v[0] - 0.004).abs() < 1e-8);
        }
    }

    /// Scenario: one gradient for a few parameters, none for the others, and none afterwards. Property: on every instruction set,
    /// the moments fade to 0 without ever being denormal, and what a parameter is does not depend on that.
    #[test]
    fn moments_without_gradients_fade_to_zero() {
        const LEN: usize = 19;
        const ROUNDS: u64 = 80_000;
        let adam = Adam::default();
        for isa in Isa::available() {
            let (mut m, mut v, mut parameters) = ([0.0f32; LEN], [0.0f32; LEN], [0.5f32; LEN]);
            let mut gradient: [f32; LEN] = std::array::from_fn(|i| if i % 3 == 0 { 0.0 } else { i as f32 });
            let (mut unfaded, mut expected) = ([0.0f32; LEN], [0.5f32; LEN]);
            for t in 1..=ROUNDS {
                let step = adam.step(t, 1);
                for i in 0..LEN {
                    unfaded[i] = (gradient[i] - unfaded[i]).mul_add(step.one_minus_beta_1, unfaded[i]);
                }
                let mut updated = [f32::NAN; LEN];
                let slices = AdamSlices {
                    parameters: &parameters,
                    gradient_sum: &gradient,
                    first_moment: &mut m,
                    second_moment: &mut v,
                    updated: &mut updated,
                };
                apply(isa, step, slices, &mut SquareSum::default());
                parameters = updated;
                assert!(!m.iter().chain(&v).any(|moment| moment.is_subnormal()), "round {t} on {isa}: {m:?}, {v:?}");
                for i in 0..LEN {
                    let denominator = v[i].sqrt().mul_add(step.root_scale, step.epsilon);
                    expected[i] -= step.rate * unfaded[i] / denominator;
                }
                gradient = [0.0; LEN];
            }
            assert_eq!((m, v), ([0.0; LEN], [0.0; LEN]), "{isa}");
            assert!(unfaded.iter().any(|moment| moment.is_subnormal()), "a decay that is rounded ends before 0");
            assert_eq!(parameters, expected, "{isa}");
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        let wrong = Adam { beta_2: 1.0, ..Adam::default() };
        assert!(wrong.problem().unwrap().contains("beta_2 is 1"));
        assert!(Adam { learning_rate: f64::NAN, ..Adam::default() }.problem().is_some());
        assert_eq!(Adam::default().problem(), None);
    }
}
