//! A closer look at leaves whose sums are not finite: which samples, and which layers.

use super::network::{Network, Weights};
use super::subtree::{Buffers, LeafSource, NodeSum, subtree};
use crate::model::Layout;
use crate::reduce::NodeId;

/// A leaf whose loss or gradient is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct NotFinite {
    /// Which leaf.
    pub leaf: u32,
    /// The samples whose own loss or gradient is not finite, counted within the leaf: at most as many as were asked for.
    /// Empty if only their sum is not finite.
    pub samples: Vec<u32>,
    /// The loss of the first of these samples, or else of the leaf.
    pub loss: f64,
    /// The first and the last tensor of the layout in which that sample's or leaf's gradient is not finite.
    pub tensors: Option<(u32, u32)>,
}

/// What to look at.
#[derive(Clone, Copy)]
pub struct Inspection<'a> {
    /// The network.
    pub network: &'a Network,
    /// Its weights.
    pub weights: Weights<'a>,
    /// Where its parameters lie.
    pub layout: &'a Layout,
    /// The samples.
    pub source: &'a dyn LeafSource,
    /// How many samples of a leaf are named at most.
    pub max_samples: usize,
}

impl Inspection<'_> {
    /// The first leaf under `node` whose loss or gradient is not finite. Runs in the current rayon pool.
    pub fn first_not_finite(&self, node: NodeId, buffers: &Buffers) -> Option<NotFinite> {
        node.leaves().find_map(|leaf| self.leaf(leaf, buffers))
    }

    fn leaf(&self, leaf: u32, buffers: &Buffers) -> Option<NotFinite> {
        let (loss, tensors) = self.not_finite(leaf, self.source, buffers)?;
        let mut found = NotFinite { leaf, samples: Vec::new(), loss, tensors };
        for sample in 0..self.source.samples(leaf) {
            if found.samples.len() == self.max_samples {
                break;
            }
            let alone = OneSample { source: self.source, leaf, sample };
            let Some((loss, tensors)) = self.not_finite(leaf, &alone, buffers) else { continue };
            if found.samples.is_empty() {
                (found.loss, found.tensors) = (loss, tensors);
            }
            found.samples.push(sample);
        }
        Some(found)
    }

    /// Loss and tensors of a leaf's sum, if they are not finite.
    fn not_finite(&self, leaf: u32, source: &dyn LeafSource, buffers: &Buffers) -> Option<(f64, Option<(u32, u32)>)> {
        let NodeSum { gradient, loss, .. } = subtree(self.network, self.weights, NodeId::leaf(leaf), source, buffers);
        let tensors = (0..).zip(self.layout.entries());
        let mut wrong =
            tensors.filter(|(_, entry)| gradient[entry.range.clone()].iter().any(|value| !value.is_finite()));
        let first = wrong.next().map(|(first, _)| first);
        let tensors = first.map(|first| (first, wrong.last().map_or(first, |(last, _)| last)));
        buffers.recycle(gradient);
        (tensors.is_some() || !loss.is_finite()).then_some((loss, tensors))
    }
}

/// One sample of a leaf as if the leaf had no other.
struct OneSample<'a> {
    source: &'a dyn LeafSource,
    leaf: u32,
    sample: u32,
}

impl LeafSource for OneSample<'_> {
    fn samples(&self, leaf: u32) -> u32 {
        u32::from(leaf == self.leaf)
    }

    fn write(&self, leaf: u32, _: usize, out: &mut [f32]) {
        self.source.write(leaf, self.sample as usize, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{AlignedFloats, Isa};
    use crate::model::preset;
    use crate::nn::{Loss, initial_parameters};

    /// Leaves of two samples of a small value each; those in `large` are so large that their squares overflow.
    struct Samples {
        large: Vec<(u32, usize)>,
        value: f32,
    }

    impl LeafSource for Samples {
        fn samples(&self, _: u32) -> u32 {
            2
        }

        fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
            out.fill(if self.large.contains(&(leaf, i)) { self.value } else { 0.5 });
        }
    }

    fn found(preset_name: &str, source: &Samples, parameters: impl Fn(&mut [f32], &Layout)) -> Option<NotFinite> {
        let model = preset(preset_name).unwrap().resolve().unwrap();
        let network = Network::new(&model, Loss::Mse, Isa::SCALAR);
        let mut flat = initial_parameters(&model.layout, 1);
        parameters(&mut flat, &model.layout);
        let mut packed = AlignedFloats::zeros(network.packed_len());
        network.pack(&flat, &mut packed);
        let weights = Weights { parameters: &flat, packed: &packed };
        let inspection = Inspection { network: &network, weights, layout: &model.layout, source, max_samples: 8 };
        inspection.first_not_finite(NodeId { level: 1, index: 1 }, &Buffers::default())
    }

    #[test]
    fn the_leaf_its_samples_and_the_layers_are_named() {
        for preset in ["dense", "conv"] {
            let source = Samples { large: vec![(0, 0), (3, 1)], value: 3e38 };
            let found = found(preset, &source, |_, _| {}).unwrap();
            assert_eq!((found.leaf, &found.samples[..]), (3, &[1][..]), "{preset}: {found:?}");
            assert!(!found.loss.is_finite(), "{preset}: {found:?}");
        }
    }

    #[test]
    fn what_is_finite_is_not_found() {
        assert_eq!(found("dense", &Samples { large: vec![], value: 0.0 }, |_, _| {}), None);
    }

    #[test]
    fn a_wrong_parameter_shows_in_every_sample() {
        let source = Samples { large: vec![], value: 0.0 };
        let found =
            found("dense", &source, |flat, layout| flat[layout.entries()[0].range.start] = f32::INFINITY).unwrap();
        assert_eq!((found.leaf, &found.samples[..]), (2, &[0, 1][..]));
        assert!(found.tensors.is_some());
    }
}
