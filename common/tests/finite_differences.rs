//! Outputs, losses and gradients agree with a naive `f64` forward pass and its central differences, for every kind of
//! layer, every activation, both losses, and a fixed family of random architectures.

#[path = "support/keras.rs"]
mod keras;

use lockstep_common::kernel::Isa;
use lockstep_common::model::{Activation, ConvSpec, LayerSpec, ModelSpec, Padding, Pair, PoolSpec, ResolvedModel};
use lockstep_common::nn::{Loss, Network, Weights};
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shape::Shape;

/// Half the distance of the two points of a difference.
const STEP: f64 = 2e-6;
/// No value may lie closer to a point where a derivative jumps.
const MARGIN: f64 = 1e-4;
/// Draws of parameters and samples after which a model has no case.
const ATTEMPTS: u32 = 40;
/// Allowed differences, relative to the largest element of a tensor.
const OUTPUT_TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;
/// Tensors whose gradients are this much smaller than another one's are compared as if they were not.
const SMALLEST_GRADIENT: f64 = 1e-3;

const SAMPLES: usize = 2;

const RANDOM_MODELS: u32 = 200;

/// A model and what is drawn for it.
struct Case {
    spec: ModelSpec,
    loss: Loss,
    /// Scales the kernels, to reach all pieces of the activations.
    gain: f32,
    /// Elements of a tensor whose derivatives are taken one by one; all of them together are tested along one
    /// direction.
    elements: usize,
}

impl Case {
    fn new(spec: ModelSpec) -> Self {
        Self { spec, loss: Loss::Mse, gain: 1.0, elements: 12 }
    }
}

struct Drawn {
    parameters: Vec<f32>,
    samples: Vec<Vec<f32>>,
}

fn check(case: &Case) {
    assert!(check_unless_kinked(case), "{}: no draw keeps away from all kinks", case.spec.name);
}

/// Whether there was something to check: a draw that keeps away from all kinks.
fn check_unless_kinked(case: &Case) -> bool {
    let name = format!("{} ({})", case.spec.name, case.loss);
    let model = case.spec.resolve().unwrap_or_else(|error| panic!("{error}"));
    let distance = |drawn: &Drawn| mean_loss(&model, case.loss, drawn, &doubles(&drawn.parameters)).1;
    let mut draws = (0..ATTEMPTS).map(|attempt| draw(&model, case.gain, attempt));
    let Some(drawn) = draws.find(|drawn| distance(drawn) > MARGIN) else { return false };
    let parameters = doubles(&drawn.parameters);

    let ours = Ours::of(&model, case.loss, &drawn);
    for (sample, output) in drawn.samples.iter().zip(&ours.outputs) {
        let mut margin = f64::INFINITY;
        let expected = keras::forward(&model, &parameters, &doubles(sample), &mut margin);
        compare(&format!("{name}: output"), &doubles(output), &expected, 0.0, OUTPUT_TOLERANCE);
    }
    let (loss, _) = mean_loss(&model, case.loss, &drawn, &parameters);
    compare(&format!("{name}: loss"), &[ours.loss], &[loss], 0.0, OUTPUT_TOLERANCE);

    let difference = |direction: &dyn Fn(usize) -> f64| {
        let at = |step: f64| {
            let moved: Vec<f64> = parameters.iter().enumerate().map(|(i, p)| p + step * direction(i)).collect();
            mean_loss(&model, case.loss, &drawn, &moved).0
        };
        (at(STEP) - at(-STEP)) / (2.0 * STEP)
    };
    let floor = SMALLEST_GRADIENT * largest(&ours.gradient);
    for entry in model.layout.entries() {
        let gradient = &ours.gradient[entry.range.clone()];
        let mut stream = Stream::new(3, Purpose::SelfTest, entry.range.start as u32, 0);
        let count = gradient.len().min(case.elements);
        let picked: Vec<usize> = match count == gradient.len() {
            true => (0..count).collect(),
            false => (0..count).map(|_| stream.below(gradient.len() as u32) as usize).collect(),
        };
        let scale = floor.max(largest(gradient));
        for i in picked {
            let expected = difference(&|j| if j == entry.range.start + i { 1.0 } else { 0.0 });
            let place = format!("{name}: {}[{i}]", entry.name);
            compare(&place, &[gradient[i]], &[expected], scale, GRADIENT_TOLERANCE);
        }
        let signs: Vec<f64> = gradient.iter().map(|_| f64::from(stream.below(2)) * 2.0 - 1.0).collect();
        let length = (gradient.len() as f64).sqrt();
        let expected =
            difference(&|j| if entry.range.contains(&j) { signs[j - entry.range.start] / length } else { 0.0 });
        let along: f64 = gradient.iter().zip(&signs).map(|(gradient, sign)| gradient * sign / length).sum();
        compare(&format!("{name}: {} along a direction", entry.name), &[along], &[expected], scale, GRADIENT_TOLERANCE);
    }
    true
}

fn compare(place: &str, ours: &[f64], expected: &[f64], least_scale: f64, tolerance: f64) {
    assert_eq!(ours.len(), expected.len(), "{place}: number of elements");
    let scale = largest(expected).max(least_scale);
    for (i, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        let difference = (ours - expected).abs();
        assert!(
            difference <= tolerance * scale,
            "{place}: element {i} is {ours:e}, expected {expected:e}: differs by {difference:e}, allowed is {:e}",
            tolerance * scale
        );
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Mean loss of the samples, and the distance to the nearest kink.
fn mean_loss(model: &ResolvedModel, loss: Loss, drawn: &Drawn, parameters: &[f64]) -> (f64, f64) {
    let mut margin = f64::INFINITY;
    let sum: f64 = drawn
        .samples
        .iter()
        .map(|sample| {
            let target = doubles(sample);
            let output = keras::forward(model, parameters, &target, &mut margin);
            keras::loss(loss, &output, &target, &mut margin)
        })
        .sum();
    (sum / drawn.samples.len() as f64, margin)
}

/// Glorot's kernels times `gain`, biases that are not 0, samples in 0..1.
fn draw(model: &ResolvedModel, gain: f32, attempt: u32) -> Drawn {
    let mut stream = Stream::new(1, Purpose::SelfTest, attempt, 0);
    let mut parameters = Vec::new();
    for entry in model.layout.entries() {
        let limit = match entry.shape[..] {
            [ref window @ .., a, b] => gain * (6.0 / (window.iter().product::<usize>() * (a + b)) as f32).sqrt(),
            _ => 0.3,
        };
        parameters.extend(entry.range.clone().map(|_| (stream.uniform() * 2.0 - 1.0) * limit));
    }
    let elements = model.input_shape().elements();
    let samples = (0..SAMPLES).map(|_| (0..elements).map(|_| stream.uniform()).collect()).collect();
    Drawn { parameters, samples }
}

/// What the library computes.
struct Ours {
    outputs: Vec<Vec<f32>>,
    loss: f64,
    /// Of the mean loss.
    gradient: Vec<f64>,
}

impl Ours {
    fn of(model: &ResolvedModel, loss: Loss, drawn: &Drawn) -> Self {
        let network = Network::new(model, loss, Isa::best());
        let mut packed = vec![0.0; network.packed_len()];
        network.pack(&drawn.parameters, &mut packed);
        let weights = Weights { parameters: &drawn.parameters, packed: &packed };
        let write = |i: usize, out: &mut [f32]| out.copy_from_slice(&drawn.samples[i]);
        let mut workspace = network.workspace();
        let mut output = vec![0.0; SAMPLES * network.input_elements()];
        network.reconstruct(weights, SAMPLES, &write, &mut output, &mut workspace);
        let mut gradient = vec![0.0; network.parameters()];
        let sum = network.leaf_gradient(weights, SAMPLES, &write, &mut gradient, &mut workspace);
        Self {
            outputs: output.chunks_exact(network.input_elements()).map(<[f32]>::to_vec).collect(),
            loss: sum / SAMPLES as f64,
            gradient: gradient.iter().map(|&sum| f64::from(sum) / SAMPLES as f64).collect(),
        }
    }
}

fn pair(rows: usize, columns: usize) -> Pair {
    Pair { rows, columns }
}

fn dense(units: usize, activation: Activation) -> LayerSpec {
    LayerSpec::Dense { units, activation, use_bias: true }
}

fn conv(filters: usize, kernel_size: Pair, strides: Pair, padding: Padding, activation: Activation) -> ConvSpec {
    ConvSpec { filters, kernel_size, strides, padding, activation, use_bias: true }
}

/// An autoencoder around `layers`: a dense layer before them, so that they have an input gradient, and after them, if
/// that is needed, a dense layer back to the input's shape.
fn around(name: String, input: [usize; 3], layers: Vec<LayerSpec>, last: Activation) -> ModelSpec {
    let input = Shape::new(input);
    let decoder =
        vec![LayerSpec::Flatten {}, dense(input.elements(), last), LayerSpec::Reshape { target_shape: input.clone() }];
    let encoder = std::iter::once(dense(3, Activation::Tanh)).chain(layers).collect();
    ModelSpec { name, input, encoder, decoder }
}

/// Windows of 1 to 5 with strides of 1 to 3, down and across, in both paddings.
fn windows() -> impl Iterator<Item = (Pair, Pair, Padding)> {
    let sizes = (1..=5).flat_map(|size| (1..=3).map(move |stride| (size, stride)));
    sizes.flat_map(|(size, stride)| {
        [Padding::Valid, Padding::Same].map(move |padding| {
            // Across, other sizes and strides than down.
            (pair(size, (size + stride) % 5 + 1), pair(stride, (size + stride) % 3 + 1), padding)
        })
    })
}

#[test]
fn convolutions() {
    for (size, strides, padding) in windows() {
        let layer = LayerSpec::Conv2d(conv(4, size, strides, padding, Activation::Tanh));
        check(&Case::new(around(
            format!("conv2d {size} {strides} {padding}"),
            [7, 6, 2],
            vec![layer],
            Activation::Linear,
        )));
    }
}

#[test]
fn transposed_convolutions() {
    for (size, strides, padding) in windows() {
        let layer = LayerSpec::Conv2dTranspose(conv(4, size, strides, padding, Activation::Tanh));
        let name = format!("conv2d_transpose {size} {strides} {padding}");
        check(&Case::new(around(name, [3, 4, 2], vec![layer], Activation::Linear)));
    }
}

#[test]
fn pooling() {
    for (pool_size, strides, padding) in windows() {
        for strides in [Some(strides), None] {
            let pool = PoolSpec { pool_size, strides, padding };
            for layer in [LayerSpec::MaxPool2d(pool.clone()), LayerSpec::AveragePool2d(pool.clone())] {
                let name = format!("{} {pool_size} {strides:?} {padding}", layer.kind());
                check(&Case::new(around(name, [7, 6, 2], vec![layer], Activation::Linear)));
            }
        }
    }
}

#[test]
fn up_sampling() {
    for size in [pair(1, 1), pair(1, 2), pair(3, 1), pair(2, 2), pair(2, 3), pair(5, 4)] {
        let layer = LayerSpec::UpSampling2d { size };
        check(&Case::new(around(format!("up_sampling2d {size}"), [3, 2, 2], vec![layer], Activation::Linear)));
    }
}

#[test]
fn convolutions_with_few_outputs_of_many_channels() {
    // From 16 channels to fewer, products are taken tap by tap.
    for transposed in [false, true] {
        for (channels, filters) in [(16, 1), (17, 3), (33, 15), (16, 16), (15, 2), (3, 17)] {
            let conv = |filters, size, strides| {
                let conv = conv(filters, size, strides, Padding::Same, Activation::Relu);
                if transposed { LayerSpec::Conv2dTranspose(conv) } else { LayerSpec::Conv2d(conv) }
            };
            let layers = vec![conv(channels, pair(1, 1), pair(1, 1)), conv(filters, pair(3, 2), pair(2, 1))];
            let name = format!("{} from {channels} to {filters}", layers[0].kind());
            check(&Case::new(around(name, [4, 3, 1], layers, Activation::Linear)));
        }
    }
}

#[test]
fn layers_without_bias_and_on_the_input() {
    let input = Shape::new([6, 5, 2]);
    for use_bias in [false, true] {
        let down = ConvSpec { use_bias, ..conv(5, pair(3, 2), pair(2, 1), Padding::Same, Activation::Relu) };
        let up = ConvSpec { use_bias, ..conv(2, pair(3, 3), pair(2, 1), Padding::Same, Activation::Linear) };
        let spec = ModelSpec {
            name: format!("bias {use_bias}"),
            input: input.clone(),
            encoder: vec![
                LayerSpec::Conv2d(down),
                LayerSpec::Dense { units: 3, activation: Activation::Tanh, use_bias },
            ],
            decoder: vec![LayerSpec::Conv2dTranspose(up)],
        };
        check(&Case::new(spec));
    }
}

#[test]
fn the_model_of_the_self_test() {
    let spec = ModelSpec::from_toml(include_str!("../models/self-test.toml")).unwrap();
    for loss in [Loss::Mse, Loss::BinaryCrossentropy] {
        check(&Case { loss, ..Case::new(spec.clone()) });
    }
}

#[test]
fn every_activation() {
    for activation in Activation::ALL {
        for gain in [0.5, 3.0] {
            // As part of a layer, as a layer of its own, after layers without weights, as the last one.
            let layers = vec![
                LayerSpec::Conv2d(conv(4, pair(2, 2), pair(1, 1), Padding::Same, activation)),
                dense(4, Activation::Linear),
                LayerSpec::Activation { activation },
                LayerSpec::AveragePool2d(PoolSpec { pool_size: pair(2, 1), strides: None, padding: Padding::Valid }),
                LayerSpec::Activation { activation },
                LayerSpec::Conv2dTranspose(conv(3, pair(2, 2), pair(1, 1), Padding::Valid, activation)),
            ];
            let gain = if activation == Activation::Exponential { gain / 6.0 } else { gain };
            let name = format!("{activation} with gain {gain}");
            check(&Case { gain, ..Case::new(around(name, [4, 3, 2], layers, activation)) });
        }
    }
}

#[test]
fn both_losses_after_every_activation() {
    for last in Activation::ALL {
        for loss in [Loss::Mse, Loss::BinaryCrossentropy] {
            // With this gain some outputs lie outside of 0..1, where the cross-entropy is flat.
            let spec = around(format!("last {last}"), [2, 3, 2], vec![], last);
            check(&Case { loss, gain: 0.7, ..Case::new(spec) });
            let mut spec = around(format!("last {last}, as a layer"), [2, 3, 2], vec![], Activation::Linear);
            spec.decoder.push(LayerSpec::Activation { activation: last });
            check(&Case { loss, gain: 0.7, ..Case::new(spec) });
        }
    }
}

#[test]
fn random_architectures() {
    let checked = (0..RANDOM_MODELS).filter(|&seed| {
        let mut random = Random(Stream::new(u64::from(seed), Purpose::SelfTest, 0, 0));
        check_unless_kinked(&random.case(seed))
    });
    let checked = checked.count();
    // Of the others, some max pooling always has almost equal elements.
    assert!(checked >= RANDOM_MODELS as usize * 9 / 10, "only {checked} of {RANDOM_MODELS} models could be checked");
}

/// Draws architectures.
struct Random(Stream);

impl Random {
    /// From `low` to `high`, both included.
    fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.0.below((high - low + 1) as u32) as usize
    }

    fn choose<T: Copy>(&mut self, options: &[T]) -> T {
        options[self.between(0, options.len() - 1)]
    }

    fn pair(&mut self, low: usize, high: usize) -> Pair {
        pair(self.between(low, high), self.between(low, high))
    }

    fn activation(&mut self) -> Activation {
        self.choose(&Activation::ALL)
    }

    fn conv(&mut self, kernel_size: Pair, padding: Padding) -> ConvSpec {
        let filters = self.choose(&[1, 2, 3, 5, 8, 9, 16, 17]);
        let strides = self.pair(1, 3);
        ConvSpec {
            filters,
            kernel_size,
            strides,
            padding,
            activation: self.activation(),
            use_bias: self.between(0, 4) > 0,
        }
    }

    fn layer(&mut self, (height, width, channels): (usize, usize, usize)) -> LayerSpec {
        let padding = self.choose(&[Padding::Valid, Padding::Same]);
        let mut size = self.pair(1, 5);
        // Enlarging layers only where the image is small.
        let kind = if height * width * channels > 200 { self.between(0, 4) } else { self.between(0, 7) };
        if kind < 4 && padding == Padding::Valid {
            size = pair(size.rows.min(height), size.columns.min(width));
        }
        let pool = |strides| PoolSpec { pool_size: size, strides, padding };
        match kind {
            0 | 1 => LayerSpec::Conv2d(self.conv(size, padding)),
            2 => LayerSpec::MaxPool2d(pool(Some(self.pair(1, 3)))),
            3 => LayerSpec::AveragePool2d(pool(Some(self.pair(1, 3)))),
            4 => dense(self.between(1, 9), self.activation()),
            5 | 6 => LayerSpec::Conv2dTranspose(self.conv(size, padding)),
            _ => LayerSpec::UpSampling2d { size: self.pair(1, 2) },
        }
    }

    fn case(&mut self, seed: u32) -> Case {
        let input = [self.between(2, 7), self.between(2, 7), self.between(1, 3)];
        let mut spec = around(format!("random {seed}"), input, vec![], Activation::Linear);
        for _ in 0..self.between(1, 4) {
            // The shape so far is that of a model's code.
            let shape = spec.resolve().unwrap_or_else(|error| panic!("{error}")).code_shape().clone();
            let layer = self.layer(shape.as_image().expect("the layers keep an image"));
            spec.encoder.push(layer);
        }
        let loss = self.choose(&[Loss::Mse, Loss::BinaryCrossentropy]);
        let last = match loss {
            Loss::Mse => self.choose(&[Activation::Linear, Activation::Tanh, Activation::Sigmoid]),
            Loss::BinaryCrossentropy => Activation::Sigmoid,
        };
        spec.decoder.push(LayerSpec::Activation { activation: last });
        Case { loss, ..Case::new(spec) }
    }
}
