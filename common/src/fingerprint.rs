//! The numerics fingerprint: do two processes compute the same bits?
//!
//! A worker announces the digest of a small computation that touches every kernel. A coordinator admits only workers
//! whose digest equals its own, so that a build with other arithmetic can never mix its bits into a run.

use crate::hash::{Digest, DigestBuilder};
use crate::kernel::{AlignedFloats, Isa, elementwise};
use crate::model::{Activation, ModelSpec};
use crate::nn::{Loss, Network, Weights, initial_parameters};
use crate::rng::{Purpose, Stream};

/// Version of the numerics contract (`docs/numerics.md`). Raised when an order of summation or a polynomial changes on
/// purpose, even if the self-test does not notice.
pub const NUMERICS_VERSION: u64 = 1;

/// A model with every kind of layer, odd sizes and channel counts that leave vectors part-filled.
const SELF_TEST_MODEL: &str = include_str!("../models/self-test.toml");

/// The fingerprint of computing on `isa`.
pub fn fingerprint(isa: Isa) -> Digest {
    let mut digest = DigestBuilder::default();
    digest.number(NUMERICS_VERSION);
    let model = ModelSpec::from_toml(SELF_TEST_MODEL)
        .expect("the self-test model parses: a test reads it")
        .resolve()
        .expect("the self-test model resolves: a test reads it");
    let mut stream = Stream::new(0, Purpose::SelfTest, 0, 0);
    for loss in [Loss::Mse, Loss::BinaryCrossentropy] {
        let network = Network::new(&model, loss, isa);
        let parameters = initial_parameters(&model.layout, 1);
        let mut packed = AlignedFloats::zeros(network.packed_len());
        network.pack(&parameters, &mut packed);
        let samples: Vec<f32> = (0..3 * network.input_elements()).map(|_| stream.uniform()).collect();
        let write = |i: usize, out: &mut [f32]| {
            out.copy_from_slice(&samples[i * network.input_elements()..][..network.input_elements()]);
        };
        let mut gradient = vec![0.0; network.parameters()];
        let weights = Weights { parameters: &parameters, packed: &packed };
        let sum = network.leaf_gradient(weights, 3, &write, &mut gradient, &mut network.workspace());
        digest.number(sum.to_bits());
        digest.floats(&gradient);
    }
    let grid: Vec<f32> = (0..257).map(|_| stream.uniform() * 24.0 - 12.0).collect();
    for activation in Activation::ALL {
        let mut values = grid.clone();
        elementwise::activate(isa, activation, &mut values);
        digest.floats(&values);
        let mut gradient = vec![1.0; grid.len()];
        let at = if elementwise::needs_input(activation) { &grid } else { &values };
        elementwise::activate_backward(isa, activation, at, &mut gradient);
        digest.floats(&gradient);
    }
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_has_the_fingerprint_of_the_specification() {
        let expected = fingerprint(Isa::SCALAR);
        for isa in Isa::available() {
            assert_eq!(fingerprint(isa), expected, "{isa}");
        }
    }
}
