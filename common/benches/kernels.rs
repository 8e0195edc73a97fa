//! Micro-benchmarks of the compute core on one thread: `cargo bench -p lockstep-common`, with a part of a name to run
//! just some. `lockstep bench` measures the same things in a network's own surroundings, and against the machine's peak.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use lockstep_common::kernel::contraction::{
    After, ChannelCounts, Crew, Dense, DenseForward, DenseInputGradient, DenseShape, DenseWeightGradient, Direction,
    Gather, GatherOperands, PixelRelation, Reduce, ReduceOperands, SLACK, Scatter, SparseReduce,
};
use lockstep_common::kernel::elementwise::{self, AdamSlices, SquareSum};
use lockstep_common::kernel::{AlignedFloats, Isa, Precision, probe};
use lockstep_common::model::{Padding, Pair, preset};
use lockstep_common::nn::{Loss, Network, Weights, initial_parameters};
use lockstep_common::optim::Adam;
use lockstep_common::optim::adam::{self, Moments};

fn main() {
    divan::main();
}

/// Numbers that are neither 0 nor alike.
fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 37) as f32 * 0.03 - 0.5).collect()
}

/// What the others are to be compared with: 2 million multiply-adds that touch no memory; items are operations.
#[divan::bench]
fn multiply_adds(bencher: Bencher<'_, '_>) {
    let isa = Isa::best();
    let steps = 10_000;
    let operations = probe::multiply_adds(isa, steps);
    bencher.counter(ItemsCount::new(operations)).bench(|| probe::multiply_adds(isa, black_box(steps)));
}

/// Rows, products in a sum, columns.
type Shape = (usize, usize, usize);

/// Whole tiles, tails of rows, tails of columns, and short sums.
const SHAPES: [Shape; 6] = [(96, 512, 64), (96, 64, 64), (97, 512, 64), (96, 512, 65), (96, 512, 16), (96, 512, 1)];

/// The microkernel over a matrix product; items are operations.
#[divan::bench(args = SHAPES)]
fn product(bencher: Bencher<'_, '_>, (rows, depth, columns): Shape) {
    let channels = ChannelCounts { high: depth, low: columns };
    let plan = Gather::new(Isa::best(), &PixelRelation::pointwise(rows), Direction::ToLow, channels, 1);
    gather(bencher, &plan, Sizes { input: rows * depth, weights: depth * columns, output: rows * columns, samples: 1 });
}

/// A layer of `article`.
#[derive(Clone, Copy)]
struct Convolution {
    name: &'static str,
    high: usize,
    low: usize,
    strides: usize,
    padding: Padding,
    channels: ChannelCounts,
    /// Whether the layer computes the high image.
    transposed: bool,
}

impl std::fmt::Display for Convolution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl Convolution {
    const SAMPLES: usize = 8;

    fn relation(&self) -> PixelRelation {
        let [high, low, kernel, strides] = [self.high, self.low, 3, self.strides].map(Pair::square);
        PixelRelation::with_padding(high, low, kernel, strides, self.padding)
    }

    fn operations(&self) -> usize {
        2 * Self::SAMPLES * self.relation().pairs() * self.channels.high * self.channels.low
    }

    fn high_len(&self) -> usize {
        self.high * self.high * self.channels.high * Self::SAMPLES
    }

    fn low_len(&self) -> usize {
        self.low * self.low * self.channels.low * Self::SAMPLES
    }

    fn weights_len(&self) -> usize {
        9 * self.channels.high * self.channels.low
    }
}

const fn convolution(name: &'static str, high: usize, low: usize, high_channels: usize) -> Convolution {
    let channels = ChannelCounts { high: high_channels, low: 64 };
    Convolution { name, high, low, strides: 1, padding: Padding::Valid, channels, transposed: false }
}

const fn transposed(name: &'static str, high: usize, low: usize, padding: Padding) -> Convolution {
    Convolution { strides: 2, padding, transposed: true, ..convolution(name, high, low, 64) }
}

const ARTICLE: [Convolution; 6] = [
    Convolution { channels: ChannelCounts { high: 1, low: 32 }, ..convolution("conv1", 28, 26, 1) },
    convolution("conv2", 13, 11, 32),
    convolution("conv3", 5, 3, 64),
    transposed("transposed1", 7, 3, Padding::Valid),
    transposed("transposed2", 14, 7, Padding::Same),
    Convolution { channels: ChannelCounts { high: 1, low: 64 }, ..transposed("transposed3", 28, 14, Padding::Same) },
];

/// Forward passes of 8 samples; items are operations.
#[divan::bench(args = ARTICLE)]
fn article_forward(bencher: Bencher<'_, '_>, layer: Convolution) {
    let direction = if layer.transposed { Direction::ToHigh } else { Direction::ToLow };
    article_gather(bencher, layer, direction);
}

/// Input gradients of 8 samples; items are operations.
#[divan::bench(args = ARTICLE)]
fn article_input_gradient(bencher: Bencher<'_, '_>, layer: Convolution) {
    let direction = if layer.transposed { Direction::ToLow } else { Direction::ToHigh };
    article_gather(bencher, layer, direction);
}

fn article_gather(bencher: Bencher<'_, '_>, layer: Convolution, direction: Direction) {
    let plan = Gather::new(Isa::best(), &layer.relation(), direction, layer.channels, Convolution::SAMPLES);
    let (input, output) = match direction {
        Direction::ToLow => (layer.high_len(), layer.low_len()),
        Direction::ToHigh => (layer.low_len(), layer.high_len()),
    };
    let bencher = bencher.counter(ItemsCount::new(layer.operations()));
    let sizes = Sizes { input, weights: layer.weights_len(), output, samples: Convolution::SAMPLES };
    gather(bencher, &plan, sizes);
}

/// Weight gradients of 8 samples; items are operations.
#[divan::bench(args = ARTICLE)]
fn article_weight_gradient(bencher: Bencher<'_, '_>, layer: Convolution) {
    let plan = Reduce::new(Isa::best(), &layer.relation(), layer.channels);
    let (high, low) = (values(layer.high_len() + SLACK), values(layer.low_len() + SLACK));
    let mut gradient = vec![0.0; layer.weights_len()];
    let mut scratch = AlignedFloats::zeros(plan.scratch_len(Convolution::SAMPLES));
    bencher.counter(ItemsCount::new(layer.operations())).bench_local(|| {
        let (high, low) = (black_box(&high), black_box(&low));
        let operands = ReduceOperands { high, low, gradient: &mut gradient, accumulate: false, scratch: &mut scratch };
        plan.run(Convolution::SAMPLES, operands);
    });
}

/// The second convolution and the second transposed one, whose low images are mostly 0: one element in so many is not.
const SPARSE: [(Convolution, usize); 2] = [(ARTICLE[1], 6), (ARTICLE[4], 3)];

fn sparse_values(len: usize, of: usize) -> Vec<f32> {
    values(len).into_iter().enumerate().map(|(i, value)| if (i * 7 / 5) % of == 0 { value } else { 0.0 }).collect()
}

/// High images of 8 samples without the products of zeros; items are operations, those that are left out included.
#[divan::bench(args = SPARSE.map(|(layer, _)| layer.name))]
fn article_scatter(bencher: Bencher<'_, '_>, name: &str) {
    let (layer, of) = *SPARSE.iter().find(|(layer, _)| layer.name == name).expect("a layer of the list");
    let plan = Scatter::new(Isa::best(), &layer.relation(), layer.channels);
    let input = sparse_values(layer.low_len(), of);
    let mut packed = AlignedFloats::zeros(plan.packed_len());
    plan.pack(&values(layer.weights_len()), &mut packed);
    let mut output = AlignedFloats::zeros(layer.high_len());
    let mut scratch = AlignedFloats::zeros(plan.scratch_len());
    bencher.counter(ItemsCount::new(layer.operations())).bench_local(|| {
        let (input, packed, after) = (black_box(&input), black_box(&packed), After::Keep);
        let (output, scratch) = (&mut output, &mut scratch);
        plan.run(Convolution::SAMPLES, GatherOperands { input, packed, bias: None, output, after, scratch });
    });
}

/// Weight gradients of 8 samples without the products of zeros; items as above.
#[divan::bench(args = SPARSE.map(|(layer, _)| layer.name))]
fn article_sparse_weight_gradient(bencher: Bencher<'_, '_>, name: &str) {
    let (layer, of) = *SPARSE.iter().find(|(layer, _)| layer.name == name).expect("a layer of the list");
    let plan = SparseReduce::new(Isa::best(), &layer.relation(), layer.channels);
    let (high, low) = (values(layer.high_len()), sparse_values(layer.low_len(), of));
    let mut gradient = vec![0.0; layer.weights_len()];
    let mut scratch = AlignedFloats::zeros(plan.scratch_len());
    bencher.counter(ItemsCount::new(layer.operations())).bench_local(|| {
        let (high, low) = (black_box(&high[..]), black_box(&low[..]));
        let operands = ReduceOperands { high, low, gradient: &mut gradient, accumulate: false, scratch: &mut scratch };
        plan.run(Convolution::SAMPLES, operands);
    });
}

/// Floats of a gather's buffers.
struct Sizes {
    input: usize,
    weights: usize,
    output: usize,
    samples: usize,
}

fn gather(bencher: Bencher<'_, '_>, plan: &Gather, sizes: Sizes) {
    let input = values(sizes.input + SLACK);
    let mut packed = AlignedFloats::zeros(plan.packed_len());
    plan.pack(&values(sizes.weights), &mut packed);
    let mut output = vec![0.0; sizes.output + SLACK];
    let mut scratch = vec![0.0; plan.scratch_len()];
    bencher.bench_local(|| {
        let (input, packed) = (black_box(&input), black_box(&packed));
        let (output, scratch) = (&mut output, &mut scratch);
        plan.run(sizes.samples, GatherOperands { input, packed, bias: None, output, after: After::Relu, scratch });
    });
}

/// A large dense layer, with a batch of 256 samples, on one thread.
struct DenseLayer {
    plan: Dense,
    crew: Crew,
    input: AlignedFloats,
    delta: AlignedFloats,
    weights: AlignedFloats,
}

impl DenseLayer {
    const SHAPE: DenseShape = DenseShape { pixels: 1, inputs: 768, outputs: 2048 };
    const SAMPLES: usize = 256;

    fn new() -> Self {
        let DenseShape { inputs, outputs, .. } = Self::SHAPE;
        let plan = Dense::new(Isa::best(), Self::SHAPE, Self::SAMPLES);
        let crew = Crew::new(1, plan.crew());
        let [input, delta, weights] =
            [Self::SAMPLES * inputs, Self::SAMPLES * outputs, inputs * outputs].map(Self::aligned);
        Self { plan, crew, input, delta, weights }
    }

    fn aligned(len: usize) -> AlignedFloats {
        let mut aligned = AlignedFloats::zeros(len);
        aligned.copy_from_slice(&values(len));
        aligned
    }

    fn operations() -> ItemsCount {
        ItemsCount::new(2 * Self::SAMPLES * Self::SHAPE.inputs * Self::SHAPE.outputs)
    }
}

/// Forward pass of a dense layer; items are operations.
#[divan::bench]
fn dense_forward(bencher: Bencher<'_, '_>) {
    let DenseLayer { plan, mut crew, input, weights, .. } = DenseLayer::new();
    let mut output = AlignedFloats::zeros(DenseLayer::SAMPLES * DenseLayer::SHAPE.outputs);
    bencher.counter(DenseLayer::operations()).bench_local(|| {
        let (input, weights) = (black_box(&input[..]), black_box(&weights[..]));
        let operands = DenseForward { input, weights, bias: None, output: &mut output, after: After::Relu };
        plan.forward(DenseLayer::SAMPLES, operands, &mut crew);
    });
}

/// Input gradient of a dense layer; items are operations.
#[divan::bench]
fn dense_input_gradient(bencher: Bencher<'_, '_>) {
    let DenseLayer { plan, mut crew, delta, weights, .. } = DenseLayer::new();
    let mut input_gradient = AlignedFloats::zeros(DenseLayer::SAMPLES * DenseLayer::SHAPE.inputs);
    bencher.counter(DenseLayer::operations()).bench_local(|| {
        let (delta, weights) = (black_box(&delta[..]), black_box(&weights[..]));
        let operands = DenseInputGradient { delta, weights, input_gradient: &mut input_gradient, after: After::Keep };
        plan.input_gradient(DenseLayer::SAMPLES, operands, &mut crew);
    });
}

/// Weight gradient of a dense layer, with the batch in so many leaves; items are operations.
#[divan::bench(args = [1, 2, 16, 128])]
fn dense_weight_gradient(bencher: Bencher<'_, '_>, leaves: usize) {
    let DenseLayer { plan, mut crew, input, delta, weights } = DenseLayer::new();
    let leaves = vec![DenseLayer::SAMPLES / leaves; leaves];
    let mut gradient = weights;
    bencher.counter(DenseLayer::operations()).bench_local(|| {
        let (input, delta) = (black_box(&input[..]), black_box(&delta[..]));
        let (gradient, nodes) = (&mut gradient[..], Precision::F32);
        let operands = DenseWeightGradient { input, delta, gradient, accumulate: false, nodes };
        plan.weight_gradient(&leaves, operands, &mut crew)
    });
}

const PRESETS: [&str; 4] = ["article", "dense", "wide", "conv"];

/// A network with everything that it computes with.
struct Subject {
    network: Network,
    parameters: AlignedFloats,
    packed: AlignedFloats,
}

impl Subject {
    fn new(name: &str) -> Self {
        let model = preset(name).expect("a preset").resolve().expect("a model that fits");
        let network = Network::new(&model, Loss::Mse, Isa::best());
        let parameters = initial_parameters(&model.layout, 0);
        let mut packed = AlignedFloats::zeros(network.packed_len());
        network.pack(&parameters, &mut packed);
        Self { network, parameters, packed }
    }
}

/// A leaf of 16 samples through the whole network and back; items are operations.
#[divan::bench(args = PRESETS)]
fn leaf(bencher: Bencher<'_, '_>, name: &str) {
    const SAMPLES: usize = 16;
    let Subject { network, parameters, packed } = Subject::new(name);
    let sample = values(network.input_elements());
    let write = |_: usize, out: &mut [f32]| out.copy_from_slice(&sample);
    let weights = Weights { parameters: &parameters, packed: &packed };
    let mut gradient = vec![0.0; network.parameters()];
    let mut workspace = network.workspace();
    bencher
        .counter(ItemsCount::new(network.training_flops() * SAMPLES))
        .bench_local(|| network.leaf_gradient(weights, SAMPLES, &write, &mut gradient, &mut workspace));
}

/// Packing a version of the parameters.
#[divan::bench(args = PRESETS)]
fn pack(bencher: Bencher<'_, '_>, name: &str) {
    let Subject { network, parameters, mut packed } = Subject::new(name);
    bencher
        .counter(BytesCount::of_many::<f32>(parameters.len()))
        .bench_local(|| network.pack(black_box(&parameters), &mut packed));
}

/// Floats in the L2 cache, and as many as `wide` has.
const LENGTHS: [usize; 2] = [1 << 16, 7_674_768];

/// One addition of the reduction tree.
#[divan::bench(args = LENGTHS)]
fn tree_addition(bencher: Bencher<'_, '_>, len: usize) {
    let (mut left, right) = (values(len), values(len));
    bencher
        .counter(BytesCount::of_slice(&right))
        .bench_local(|| elementwise::add(Isa::best(), &mut left, black_box(&right)));
}

/// Adam's step.
#[divan::bench(args = LENGTHS)]
fn adam_step(bencher: Bencher<'_, '_>, len: usize) {
    let (parameters, gradient_sum) = (values(len), values(len));
    let (mut moments, mut updated) = (Moments::zero(len), vec![0.0; len]);
    let step = Adam::default().step(1, 256);
    bencher.counter(BytesCount::of_slice(&parameters)).bench_local(|| {
        let slices = AdamSlices {
            parameters: black_box(&parameters),
            gradient_sum: &gradient_sum,
            first_moment: &mut moments.first,
            second_moment: &mut moments.second,
            updated: &mut updated,
        };
        adam::apply(Isa::best(), step, slices, &mut SquareSum::default());
    });
}
