//! The numerics fingerprint: do two processes compute the same bits?
//!
//! A worker announces the digest of a small computation that touches every kernel, for each precision. A coordinator
//! admits only workers whose digest for the run's precision equals its own, so that a build with other arithmetic can
//! never mix its bits into a run.

use crate::hash::{Digest, DigestBuilder};
use crate::kernel::{AlignedFloats, Arithmetic, Compute, Isa, elementwise};
use crate::model::{Activation, ModelSpec};
use crate::nn::{Loss, Network, Weights, ZeroProducts, initial_parameters};
use crate::rng::{Purpose, Stream};

/// Version of the numerics contract (`docs/numerics.md`). Raised when an order of summation or a polynomial changes on
/// purpose, even if the self-test does not notice.
pub const NUMERICS_VERSION: u64 = 4;

/// A model with every kind of layer, odd sizes and channel counts that leave vectors part-filled.
const SELF_TEST_MODEL: &str = include_str!("../models/self-test.toml");

/// Fingerprints of one process, by precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fingerprints {
    /// Of computing with 32-bit floats.
    pub f32: Digest,
    /// Of computing with operands that are rounded to bfloat16.
    pub bf16: Digest,
    /// The same, with products that are added in blocks.
    pub bf16_amx: Digest,
}

impl Fingerprints {
    /// Those of computing on `isa`.
    pub fn of(isa: Isa) -> Self {
        let [f32, bf16, bf16_amx] = Compute::ALL.map(|compute| fingerprint(Arithmetic { isa, compute }));
        Self { f32, bf16, bf16_amx }
    }

    /// The one that workers of a run that computes so must have.
    pub fn computing(&self, compute: Compute) -> Digest {
        match compute {
            Compute::F32 => self.f32,
            Compute::Bf16 => self.bf16,
            Compute::Bf16Amx => self.bf16_amx,
        }
    }
}

/// The fingerprint of computing in that way.
pub fn fingerprint(arithmetic: impl Into<Arithmetic>) -> Digest {
    let arithmetic = arithmetic.into();
    let isa = arithmetic.isa;
    let mut digest = DigestBuilder::default();
    digest.number(NUMERICS_VERSION);
    let model = ModelSpec::from_toml(SELF_TEST_MODEL)
        .expect("the self-test model parses: a test reads it")
        .resolve()
        .expect("the self-test model resolves: a test reads it");
    let mut stream = Stream::new(0, Purpose::SelfTest, 0, 0);
    for (loss, zero_products) in [
        (Loss::Mse, ZeroProducts::Taken),
        (Loss::Mse, ZeroProducts::LeftOut),
        (Loss::BinaryCrossentropy, ZeroProducts::AsIsFaster),
    ] {
        let network = Network::new(&model, loss, arithmetic).with_zero_products(zero_products);
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
    fn every_instruction_set_has_the_fingerprints_of_the_specification() {
        let expected = Fingerprints::of(Isa::SCALAR);
        for isa in Isa::available() {
            assert_eq!(Fingerprints::of(isa), expected, "{isa}");
        }
    }

    #[test]
    fn precisions_have_fingerprints_of_their_own() {
        let fingerprints = Fingerprints::of(Isa::best());
        let Fingerprints { f32, bf16, bf16_amx } = fingerprints;
        assert!(f32 != bf16 && bf16 != bf16_amx && bf16_amx != f32, "{fingerprints:?}");
        assert_eq!(f32, fingerprint(Isa::best()));
        assert_eq!(Compute::ALL.map(|compute| fingerprints.computing(compute)), [f32, bf16, bf16_amx]);
    }
}
