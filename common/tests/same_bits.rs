//! The numerics contract within one machine: a sum of gradients and losses has the same bits on every instruction set,
//! for any number of samples to a pass, and for any number of threads. That holds for each precision.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use lockstep_common::hash::Digest;
use lockstep_common::kernel::{Arithmetic, Compute, Isa, Precision, bf16};
use lockstep_common::model::{
    Activation, ConvSpec, LayerSpec, ModelSpec, Padding, Pair, PoolSpec, ResolvedModel, preset,
};
use lockstep_common::nn::{
    Buffers, LeafSource, Loss, Network, NodeSum, Told, Weights, ZeroProducts, evaluate, initial_parameters, subtree,
    subtree_in_parts,
};
use lockstep_common::reduce::{NodeId, NodeSums, Tree, add_nodes};
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shape::Shape;
use lockstep_common::shared_memory::FloatBuffer;

/// Below, at and above the widths of vectors and of panels.
const CHANNELS: [usize; 12] = [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 130];

/// A model with parameters, and as many samples as one asks for.
struct Subject {
    model: ResolvedModel,
    loss: Loss,
    parameters: Vec<f32>,
    /// Whether samples differ in size by many orders of magnitude, so that every reordered sum shows.
    uneven: bool,
}

impl Subject {
    fn new(spec: &ModelSpec, loss: Loss) -> Self {
        let model = spec.resolve().unwrap_or_else(|error| panic!("{error}"));
        let mut parameters = initial_parameters(&model.layout, 5).to_vec();
        let mut stream = Stream::new(6, Purpose::SelfTest, 0, 0);
        // Biases start at 0, which would hide them.
        parameters.iter_mut().filter(|value| **value == 0.0).for_each(|value| *value = stream.uniform() * 0.2 - 0.1);
        Self { model, loss, parameters, uneven: false }
    }

    fn name(&self) -> String {
        format!("{} ({})", self.model.spec.name, self.loss)
    }

    fn write(&self, i: usize, out: &mut [f32]) {
        let mut stream = Stream::new(7, Purpose::SelfTest, i as u32, 0);
        let scale = if self.uneven { 2.0f32.powi(stream.below(50) as i32 - 25) } else { 1.0 };
        // Many pixels of real images are exactly 0.
        out.iter_mut().for_each(|value| *value = (stream.uniform() * 1.5 - 0.5).max(0.0) * scale);
    }

    fn leaf(&self, network: &Network, samples: usize) -> Bits {
        let mut packed = vec![0.0; network.packed_len()];
        network.pack(&self.parameters, &mut packed);
        let weights = Weights { parameters: &self.parameters, packed: &packed };
        let write = |i: usize, out: &mut [f32]| self.write(i, out);
        // What stood in the gradient before must not matter.
        let mut gradient = vec![f32::NAN; network.parameters()];
        let loss = network.leaf_gradient(weights, samples, &write, &mut gradient, &mut network.workspace());
        assert!(gradient.iter().all(|value| value.is_finite()), "{}: gradient", self.name());
        assert_eq!(samples == 0, gradient.iter().all(|&value| value == 0.0), "{}: zero gradient", self.name());
        Bits::of(&gradient, loss)
    }
}

/// Equal if all bits are.
#[derive(Debug, PartialEq)]
struct Bits {
    gradient: Digest,
    loss: u64,
}

impl Bits {
    fn of(gradient: &[f32], loss: f64) -> Self {
        Self { gradient: Digest::of_floats(gradient), loss: loss.to_bits() }
    }

    fn of_node(sum: &NodeSum) -> Self {
        Self::of(&sum.gradient, sum.loss)
    }
}

/// The gradient of `samples` samples on every instruction set, and with every number of samples to a pass, is that of
/// plain code which takes one sample after the other.
fn check(subject: &Subject, leaf_sizes: &[usize], pass_sizes: &[usize]) {
    Compute::ALL.into_iter().for_each(|compute| check_in(compute, subject, leaf_sizes, pass_sizes));
}

fn check_in(compute: Compute, subject: &Subject, leaf_sizes: &[usize], pass_sizes: &[usize]) {
    let scalar = Arithmetic { isa: Isa::SCALAR, compute };
    let specification =
        Network::with_pass_samples(&subject.model, subject.loss, scalar, 1).with_zero_products(ZeroProducts::Taken);
    for &samples in leaf_sizes {
        let expected = subject.leaf(&specification, samples);
        for arithmetic in available(compute) {
            let place = format!("{}: {samples} samples in {arithmetic}", subject.name());
            for &pass in pass_sizes {
                let network = Network::with_pass_samples(&subject.model, subject.loss, arithmetic, pass);
                assert_eq!(subject.leaf(&network, samples), expected, "{place}, {pass} a pass");
                let network = network.with_zero_products(ZeroProducts::LeftOut);
                assert_eq!(subject.leaf(&network, samples), expected, "{place}, {pass} a pass, without zeros");
            }
            let network = Network::new(&subject.model, subject.loss, arithmetic);
            assert_eq!(subject.leaf(&network, samples), expected, "{place}");
        }
    }
}

fn available(compute: Compute) -> impl Iterator<Item = Arithmetic> {
    Isa::available().into_iter().map(move |isa| Arithmetic { isa, compute })
}

fn all_arithmetics() -> impl Iterator<Item = Arithmetic> {
    Compute::ALL.into_iter().flat_map(available)
}

/// Leaf sizes around those of the passes.
fn leaf_sizes(pass_samples: usize) -> [usize; 6] {
    [0, 1, 3, pass_samples, pass_samples + 1, 2 * pass_samples + 3]
}

fn file(text: &str) -> ModelSpec {
    ModelSpec::from_toml(text).unwrap()
}

fn small_article() -> ModelSpec {
    file(include_str!("golden/article.toml"))
}

/// Pooling and relu where products with zeros are left out.
fn sparse() -> ModelSpec {
    file(include_str!("support/sparse.toml"))
}

fn self_test() -> ModelSpec {
    file(include_str!("../models/self-test.toml"))
}

/// A convolutional autoencoder in which every layer takes or gives `channels` channels, or one more.
fn with_channels(channels: usize) -> ModelSpec {
    let conv = |filters, size, strides, activation| ConvSpec {
        filters,
        kernel_size: Pair::square(size),
        strides: Pair { rows: strides, columns: 1 },
        padding: Padding::Same,
        activation,
        use_bias: true,
    };
    let halves = Pair { rows: 2, columns: 1 };
    ModelSpec {
        name: format!("{channels} channels"),
        input: Shape::new([4, 3, 2]),
        encoder: vec![
            LayerSpec::Conv2d(conv(channels, 3, 1, Activation::Relu)),
            LayerSpec::MaxPool2d(PoolSpec { pool_size: halves, strides: None, padding: Padding::Valid }),
            LayerSpec::Conv2d(conv(channels + 1, 2, 2, Activation::Tanh)),
            LayerSpec::Dense { units: channels, activation: Activation::Relu, use_bias: true },
        ],
        decoder: vec![
            LayerSpec::Conv2dTranspose(conv(channels, 3, 2, Activation::Relu)),
            LayerSpec::AveragePool2d(PoolSpec {
                pool_size: halves,
                strides: Some(Pair::square(1)),
                padding: Padding::Same,
            }),
            LayerSpec::UpSampling2d { size: halves },
            LayerSpec::Conv2dTranspose(conv(2, 3, 1, Activation::Sigmoid)),
        ],
    }
}

#[test]
fn small_models_at_leaf_sizes_around_a_pass() {
    for spec in dense_models().into_iter().chain([small_article(), self_test()]) {
        for loss in [Loss::Mse, Loss::BinaryCrossentropy] {
            check(&Subject::new(&spec, loss), &leaf_sizes(4), &[1, 3, 4, 7]);
        }
    }
    for spec in [small_article(), self_test()] {
        // The number of samples that a network chooses for itself.
        let subject = Subject::new(&spec, Loss::Mse);
        let own = Network::new(&subject.model, Loss::Mse, Isa::best()).pass_samples();
        check(&subject, &leaf_sizes(own), &[]);
    }
}

#[test]
fn products_with_zeros_in_convolutions() {
    check(&Subject::new(&sparse(), Loss::Mse), &[1, 2, 7], &[2, 4]);
}

/// Scenario: an element of a sample is so large that activations overflow, or a derivative does. Property: products with zeros are
/// missing nowhere: the same sums are infinite, the same are no numbers, and the others have the same bits.
#[test]
fn what_is_not_finite_is_the_same_without_products_with_zeros() {
    let mut infinite = 0;
    for (spec, large) in dense_models()
        .into_iter()
        .chain([sparse()])
        .flat_map(|spec| [1e20, 3e37, 3e38].map(|large| (spec.clone(), large)))
    {
        let mut subject = Subject::new(&spec, Loss::Mse);
        subject.parameters.iter_mut().for_each(|parameter| *parameter *= 50.0);
        let bits = |arithmetic, zero_products| {
            let network = Network::new(&subject.model, subject.loss, arithmetic).with_zero_products(zero_products);
            let mut packed = vec![0.0; network.packed_len()];
            network.pack(&subject.parameters, &mut packed);
            let weights = Weights { parameters: &subject.parameters, packed: &packed };
            let write = |i: usize, out: &mut [f32]| {
                subject.write(i, out);
                if i == 3 {
                    let middle = out.len() / 2;
                    out[middle] = large;
                }
            };
            let mut gradient = vec![0.0; network.parameters()];
            let loss = network.leaf_gradient(weights, 14, &write, &mut gradient, &mut network.workspace());
            // All NaN are alike.
            let canonical = |value: f32| if value.is_nan() { f32::NAN } else { value };
            let gradient: Vec<u32> = gradient.into_iter().map(|value| canonical(value).to_bits()).collect();
            (gradient, if loss.is_nan() { f64::NAN } else { loss }.to_bits())
        };
        for arithmetic in all_arithmetics() {
            let expected = bits(Arithmetic { isa: Isa::SCALAR, ..arithmetic }, ZeroProducts::Taken);
            infinite += usize::from(expected.0.iter().any(|&value| !f32::from_bits(value).is_finite()));
            for zero_products in [ZeroProducts::LeftOut, ZeroProducts::AsIsFaster] {
                let place = format!("{} with {large:e} in {arithmetic}, {zero_products:?}", subject.name());
                assert!(bits(arithmetic, zero_products) == expected, "{place}");
            }
        }
    }
    assert!(infinite > 10, "{infinite} gradients are not finite");
}

#[test]
fn presets() {
    for name in ["article", "dense"] {
        check(&Subject::new(&preset(name).unwrap(), Loss::Mse), &[1, 2, 3, 7], &[2]);
    }
}

#[test]
fn leaves_in_memory_that_was_used_before() {
    for spec in [small_article(), self_test()] {
        let subject = Subject::new(&spec, Loss::Mse);
        for arithmetic in all_arithmetics() {
            let network = Network::with_pass_samples(&subject.model, subject.loss, arithmetic, 3);
            let mut packed = vec![f32::NAN; network.packed_len()];
            network.pack(&subject.parameters, &mut packed);
            let weights = Weights { parameters: &subject.parameters, packed: &packed };
            let write = |i: usize, out: &mut [f32]| subject.write(i, out);
            let mut workspace = network.workspace();
            let mut gradient = vec![0.0; network.parameters()];
            for samples in [5, 1, 0, 7] {
                let expected = subject.leaf(&network, samples);
                let loss = network.leaf_gradient(weights, samples, &write, &mut gradient, &mut workspace);
                assert_eq!(
                    Bits::of(&gradient, loss),
                    expected,
                    "{}: {samples} samples in {arithmetic}",
                    subject.name()
                );
                let evaluated = network.leaf_loss(weights, samples, &write, &mut workspace);
                assert_eq!(evaluated.to_bits(), expected.loss, "{}: {samples} samples in {arithmetic}", subject.name());
            }
        }
    }
}

#[test]
fn channel_counts_around_vector_widths() {
    for channels in CHANNELS {
        check(&Subject::new(&with_channels(channels), Loss::Mse), &[1, 3, 5, 11], &[3, 4]);
    }
}

#[test]
fn samples_of_very_different_sizes() {
    // Sums of these round in `f64` too.
    let mut linear = with_channels(9);
    let Some(LayerSpec::Conv2dTranspose(last)) = linear.decoder.last_mut() else { panic!("the last layer") };
    last.activation = Activation::Linear;
    let subject = Subject { uneven: true, ..Subject::new(&linear, Loss::Mse) };
    check(&subject, &[1, 3, 7, 16, 40], &[2, 3, 4, 16]);
}

/// Leaves of 0 to 6 samples, each with samples of its own.
struct Leaves<'a>(&'a Subject);

impl LeafSource for Leaves<'_> {
    fn samples(&self, leaf: u32) -> u32 {
        [3, 0, 6, 1, 4, 5, 2][leaf as usize % 7]
    }

    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        self.0.write(leaf as usize * 10 + i, out);
    }
}

#[test]
fn subtrees_for_any_number_of_threads_and_any_split() {
    let tree = Tree::over(16).unwrap();
    for spec in dense_models().into_iter().chain([small_article(), self_test()]) {
        let subject = Subject { uneven: true, ..Subject::new(&spec, Loss::Mse) };
        let name = subject.name();
        let mut of_first_isa = BTreeMap::new();
        for (arithmetic, nodes) in all_arithmetics().flat_map(|with| Precision::ALL.map(|nodes| (with, nodes))) {
            let network = Network::with_pass_samples(&subject.model, subject.loss, arithmetic, 4)
                .with_nodes(nodes)
                .with_zero_products(ZeroProducts::LeftOut);
            let mut packed = vec![0.0; network.packed_len()];
            network.pack(&subject.parameters, &mut packed);
            let weights = Weights { parameters: &subject.parameters, packed: &packed };
            let leaves = Leaves(&subject);
            let buffers = Buffers::default();
            // By hand: leaf by leaf, node by node.
            let sums = NodeSums { isa: arithmetic.isa, precision: nodes };
            let expected = by_children(&network, sums, weights, tree.root(), &leaves);
            let bits = Bits::of_node(&expected);
            assert_eq!(expected.samples, (0..16).map(|leaf| leaves.samples(leaf)).sum::<u32>());
            for threads in 1..=4 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                // Twice, the second time in memory that was used before.
                for _ in 0..2 {
                    let sum = pool.install(|| subtree(&network, weights, tree.root(), &leaves, &buffers));
                    assert_eq!(Bits::of_node(&sum), bits, "{name}: {threads} threads, {arithmetic}");
                    assert_eq!(sum.samples, expected.samples);
                    buffers.recycle(sum.gradient);
                }
                let evaluated = pool.install(|| evaluate(&network, weights, tree.root(), &leaves, &buffers));
                assert_eq!(
                    evaluated.loss.to_bits(),
                    bits.loss,
                    "{name}: evaluation by {threads} threads, {arithmetic}"
                );
                assert_eq!((evaluated.samples, evaluated.gradient.len()), (expected.samples, 0));
            }
            let of_first =
                of_first_isa.entry((arithmetic.compute.name(), nodes.name())).or_insert(Bits::of_node(&expected));
            assert_eq!(*of_first, bits, "{name}: {arithmetic}");
        }
    }
}

/// Dense layers alone, so that a pass takes whole leaves and threads share it: enough products for that, pixels that meet
/// the same weights, activations that need their input.
fn dense_models() -> [ModelSpec; 2] {
    let shared = r#"
        name = "shared"
        input = [131]
        encoder = [{ layer = "dense", units = 150, activation = "relu" }, { layer = "dense", units = 9, activation = "silu" }]
        decoder = [{ layer = "dense", units = 131, activation = "sigmoid" }]
    "#;
    let pixels = r#"
        name = "pixels"
        input = [5, 3]
        encoder = [
            { layer = "dense", units = 17, activation = "relu" },
            { layer = "flatten" },
            { layer = "dense", units = 4, use_bias = false },
        ]
        decoder = [{ layer = "dense", units = 15, activation = "relu" }, { layer = "activation", activation = "tanh" },
                   { layer = "reshape", target_shape = [5, 3] }]
    "#;
    [file(shared), file(pixels)]
}

#[test]
fn groups_of_leaves_are_sums_leaf_by_leaf() {
    let in_parts = AtomicUsize::new(0);
    for spec in dense_models().into_iter().chain([small_article()]) {
        let subject = Subject { uneven: true, ..Subject::new(&spec, Loss::Mse) };
        let name = subject.name();
        let leaves = Leaves(&subject);
        // Rounded operands, rounded nodes, or neither.
        let precisions = [
            (Compute::F32, Precision::F32),
            (Compute::Bf16, Precision::F32),
            (Compute::Bf16Amx, Precision::F32),
            (Compute::F32, Precision::Bf16),
        ];
        for ((compute, nodes), shards) in precisions.into_iter().flat_map(|p| [1, 2, 8, 64].map(|shards| (p, shards))) {
            let scalar = Arithmetic { isa: Isa::SCALAR, compute };
            let specification = Network::with_pass_samples(&subject.model, subject.loss, scalar, 1);
            let root = Tree::over(shards).unwrap().root();
            let (gradient, loss) = leaf_by_leaf(&subject, &specification, nodes, root, &leaves);
            let expected = Bits::of(&gradient, loss);
            // Passes that hold all leaves, some of them, or less than one.
            for (with, pass) in available(compute).flat_map(|with| [(with, 1000), (with, 16), (with, 2)]) {
                let network = Network::with_pass_samples(&subject.model, subject.loss, with, pass)
                    .with_nodes(nodes)
                    .with_zero_products(ZeroProducts::LeftOut);
                let mut packed = vec![0.0; network.packed_len()];
                network.pack(&subject.parameters, &mut packed);
                let weights = Weights { parameters: &subject.parameters, packed: &packed };
                for threads in 1..=4 {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let place = format!(
                        "{name}: {shards} leaves, {threads} threads, {pass} samples a pass, {with}, {nodes} nodes"
                    );
                    pool.install(|| {
                        let buffers = Buffers::default();
                        let sum = subtree(&network, weights, root, &leaves, &buffers);
                        assert_eq!(Bits::of_node(&sum), expected, "{place}");
                        if let Some(sum) = joined_parts(&network, weights, root, &leaves) {
                            assert_eq!(Bits::of_node(&sum), expected, "{place}, in parts");
                            in_parts.fetch_add(1, Ordering::Relaxed);
                        }
                        let evaluated = evaluate(&network, weights, root, &leaves, &buffers);
                        assert_eq!(evaluated.loss.to_bits(), expected.loss, "evaluation of {place}");
                    });
                }
            }
        }
    }
    assert!(in_parts.into_inner() > 100, "sums of dense models come in parts");
}

/// The sum of a node from the parts that are told while it is computed; `None` if there are none before the end.
fn joined_parts(network: &Network, weights: Weights<'_>, node: NodeId, leaves: &Leaves<'_>) -> Option<NodeSum> {
    const UNIT: usize = 16;
    let buffers = Buffers::default();
    let mut sum: Option<NodeSum> = None;
    let mut parts: Vec<(usize, FloatBuffer)> = Vec::new();
    let told = subtree_in_parts(network, weights, node, leaves, &buffers, UNIT, &mut |told| match told {
        Told::Loss { loss, samples } => {
            assert!(parts.is_empty() && sum.is_none(), "the loss is told first, and once");
            sum = Some(NodeSum { gradient: FloatBuffer::zeros(network.parameters()), loss, samples });
        }
        Told::Part { start, gradient } => {
            assert_eq!(start % UNIT, 0);
            let end = parts.last().map_or(network.parameters(), |(start, _)| *start);
            assert_eq!(start + gradient.len(), end, "parts adjoin, the last one first");
            parts.push((start, gradient));
        }
    });
    let mut sum = sum.filter(|_| told)?;
    assert!(parts.len() > 1 && parts.last().is_some_and(|(start, _)| *start == 0), "{} parts", parts.len());
    for (start, part) in parts {
        sum.gradient[start..start + part.len()].copy_from_slice(&part);
        // The memory comes back with the last part.
        buffers.recycle(part);
    }
    Some(sum)
}

/// The sum of a node by the specification: leaf by leaf, then plain additions, each rounded if nodes are.
fn leaf_by_leaf(
    subject: &Subject,
    network: &Network,
    nodes: Precision,
    node: NodeId,
    leaves: &Leaves<'_>,
) -> (Vec<f32>, f64) {
    let round = |value: f32| if nodes == Precision::Bf16 { bf16::round(value) } else { value };
    let Some([left, right]) = node.children() else {
        let mut packed = vec![0.0; network.packed_len()];
        network.pack(&subject.parameters, &mut packed);
        let weights = Weights { parameters: &subject.parameters, packed: &packed };
        let write = |i: usize, out: &mut [f32]| leaves.write(node.index, i, out);
        let mut gradient = vec![f32::NAN; network.parameters()];
        let samples = leaves.samples(node.index) as usize;
        let loss = network.leaf_gradient(weights, samples, &write, &mut gradient, &mut network.workspace());
        return (gradient.into_iter().map(round).collect(), loss);
    };
    let (left, left_loss) = leaf_by_leaf(subject, network, nodes, left, leaves);
    let (right, right_loss) = leaf_by_leaf(subject, network, nodes, right, leaves);
    (left.iter().zip(&right).map(|(left, right)| round(left + right)).collect(), left_loss + right_loss)
}

/// The sum of a node from its children's, which are computed apart, as by two workers.
fn by_children(network: &Network, sums: NodeSums, weights: Weights<'_>, node: NodeId, leaves: &Leaves<'_>) -> NodeSum {
    let whole = subtree(network, weights, node, leaves, &Buffers::default());
    let Some([left, right]) = node.children() else { return whole };
    let mut left = by_children(network, sums, weights, left, leaves);
    let right = by_children(network, sums, weights, right, leaves);
    add_nodes(sums, &mut left.gradient, &right.gradient);
    left.loss += right.loss;
    left.samples += right.samples;
    assert_eq!(Bits::of_node(&left), Bits::of_node(&whole), "node {node} from its children");
    left
}

/// In bfloat16, passes take pairs of samples.
#[test]
fn passes_in_bfloat16_have_even_numbers_of_samples() {
    let subject = Subject::new(&small_article(), Loss::Mse);
    let pass = |compute, samples| {
        let arithmetic = Arithmetic { isa: Isa::best(), compute };
        Network::with_pass_samples(&subject.model, subject.loss, arithmetic, samples).pass_samples()
    };
    assert_eq!([1, 2, 7].map(|samples| pass(Compute::F32, samples)), [1, 2, 7]);
    for compute in [Compute::Bf16, Compute::Bf16Amx] {
        assert_eq!([1, 2, 7].map(|samples| pass(compute, samples)), [2, 2, 8]);
    }
}

/// Rounding changes the sums, but not by more than what 8 bits of significand leave open.
#[test]
fn sums_in_bfloat16_are_near_those_in_f32() {
    for spec in dense_models().into_iter().chain([small_article(), self_test()]) {
        let subject = Subject::new(&spec, Loss::Mse);
        let gradient = |compute| {
            let network = Network::new(&subject.model, subject.loss, Arithmetic { isa: Isa::best(), compute });
            let mut packed = vec![0.0; network.packed_len()];
            network.pack(&subject.parameters, &mut packed);
            let weights = Weights { parameters: &subject.parameters, packed: &packed };
            let write = |i: usize, out: &mut [f32]| subject.write(i, out);
            let mut gradient = vec![f32::NAN; network.parameters()];
            let loss = network.leaf_gradient(weights, 13, &write, &mut gradient, &mut network.workspace());
            (gradient, loss)
        };
        let (exact, exact_loss) = gradient(Compute::F32);
        for compute in [Compute::Bf16, Compute::Bf16Amx] {
            let (rounded, rounded_loss) = gradient(compute);
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
            };
            let size = norm(&mut exact.iter().copied());
            let error = norm(&mut exact.iter().zip(&rounded).map(|(exact, rounded)| exact - rounded)) / size;
            let place = format!("{} in {compute}", subject.name());
            assert!(error > 1e-5 && error < 0.05, "{place}: the gradient differs by {error:e} of its size");
            let error = (rounded_loss / exact_loss - 1.0).abs();
            assert!(error < 0.01, "{place}: the loss differs by {error:e}");
        }
    }
}
