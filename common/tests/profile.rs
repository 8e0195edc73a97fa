//! A profile does what training does, and tells of every part once, in the order of the passes.

use lockstep_common::kernel::{AlignedFloats, Isa};
use lockstep_common::model::preset;
use lockstep_common::nn::{Buffers, Lap, LeafSource, Loss, Network, Weights, initial_parameters, profile};
use lockstep_common::reduce::Tree;

/// Two samples for each leaf.
struct Two;

impl LeafSource for Two {
    fn samples(&self, _leaf: u32) -> u32 {
        2
    }

    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        out.fill(leaf as f32 * 0.1 + i as f32 * 0.01);
    }
}

/// The laps of a preset's pass over the first leaves of four, and how many samples those have.
fn laps(name: &str) -> (Network, Vec<Lap>, u32) {
    let model = preset(name).unwrap().resolve().unwrap();
    let network = Network::new(&model, Loss::Mse, Isa::best());
    let parameters = initial_parameters(&model.layout, 0);
    let mut packed = AlignedFloats::zeros(network.packed_len());
    network.pack(&parameters, &mut packed);
    let weights = Weights { parameters: &parameters, packed: &packed };
    let mut laps = Vec::new();
    let root = Tree::over(4).unwrap().root();
    let samples = profile(&network, weights, root, &Two, &Buffers::default(), &mut |lap| laps.push(lap));
    (network, laps, samples)
}

/// Every step forward, the loss, every step back; nothing is trained before the first layer with weights.
fn check(name: &str, steps: &[&str]) -> u32 {
    let (network, laps, samples) = laps(name);
    let places: Vec<String> = (0..).map_while(|step| Some(network.step(step)?.0.to_string())).collect();
    assert_eq!(places, steps, "{name}");
    let (mut expected, mut products) = (vec![Lap::Input], 0);
    expected.extend((0..steps.len()).map(Lap::Forward));
    expected.push(Lap::Loss);
    for step in (0..steps.len()).rev() {
        let (_, of_step) = network.step(step).unwrap();
        expected.extend((of_step > 0).then_some(Lap::WeightGradient(step)));
        expected.extend((step > 0).then_some(Lap::InputGradient(step)));
        products += of_step * if step > 0 { 3 } else { 2 };
    }
    assert_eq!(2 * products, network.training_flops(), "{name}");
    assert_eq!(laps, expected, "{name}");
    samples
}

#[test]
fn a_convolutional_network_is_profiled_leaf_by_leaf() {
    let steps = [
        "encoder.0.conv2d",
        "encoder.1.max_pool2d",
        "encoder.2.conv2d",
        "encoder.3.max_pool2d",
        "encoder.4.conv2d",
        "decoder.0.conv2d_transpose",
        "decoder.1.conv2d_transpose",
        "decoder.2.conv2d_transpose",
    ];
    assert_eq!(check("article", &steps), 2);
    // Layers that only rename axes are no steps.
    let steps = [
        "encoder.0.conv2d",
        "encoder.1.conv2d",
        "encoder.3.dense",
        "decoder.0.dense",
        "decoder.2.conv2d_transpose",
        "decoder.3.conv2d_transpose",
    ];
    assert_eq!(check("conv", &steps), 2);
}

#[test]
fn a_dense_network_is_profiled_with_all_leaves_that_fit_a_pass() {
    let steps = [
        "encoder.0.dense",
        "encoder.1.dense",
        "encoder.2.dense",
        "decoder.0.dense",
        "decoder.1.dense",
        "decoder.2.dense",
    ];
    assert_eq!(check("dense", &steps), 8);
}
