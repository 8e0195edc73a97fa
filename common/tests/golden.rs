//! Every run in `golden/` comes out as PyTorch computed it in `f64`: output, loss, each gradient, and ten steps of Adam.
//!
//! `golden/generate.py` makes the files and documents them. `LOCKSTEP_GOLDEN_DIR` names another folder of such files,
//! for soak runs with `generate.py --random`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use lockstep_common::kernel::Isa;
use lockstep_common::kernel::elementwise::{AdamSlices, SquareSum};
use lockstep_common::model::{ModelSpec, ResolvedModel};
use lockstep_common::nn::{Loss, Network, Weights};
use lockstep_common::optim::adam::{self, Adam, Moments};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// Largest difference of outputs and losses, relative to the largest element of the tensor.
const TOLERANCE: f64 = 1e-5;
/// The same for gradients, which are sums of more roundings.
const GRADIENT_TOLERANCE: f64 = 5e-5;
/// The same for trained parameters, whose elements count as 1 if none is larger: Adam moves every element by up to the
/// learning rate, however small its gradient, and so however much of it is rounding. See `deviation` in generate.py.
const TRAINED_TOLERANCE: f64 = 5e-6;

const STEPS: u64 = 10;

#[test]
fn every_case_matches_on_every_instruction_set() {
    let folder = std::env::var_os("LOCKSTEP_GOLDEN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    let files = model_files(&folder);
    assert!(!files.is_empty(), "no case (NAME.toml beside NAME.safetensors) in {}", folder.display());
    let mut comparison = Comparison::default();
    for file in &files {
        let case = Case::read(file);
        for isa in Isa::available() {
            check(&case, isa, &mut comparison);
        }
    }
    println!("{} cases on {:?}; largest differences, relative:", files.len(), Isa::available());
    comparison.worst.iter().for_each(|(kind, (difference, place))| println!("  {kind}: {difference:.1e} ({place})"));
    assert!(
        comparison.failures.is_empty(),
        "{} tensors differ:\n{}",
        comparison.failures.len(),
        comparison.failures.join("\n")
    );
}

fn check(case: &Case, isa: Isa, comparison: &mut Comparison) {
    let network = Network::new(&case.model, case.loss, isa);
    let mut workspace = network.workspace();
    let mut packed = vec![0.0; network.packed_len()];
    let write = |i: usize, out: &mut [f32]| {
        let elements = network.input_elements();
        out.copy_from_slice(&case.input[i * elements..][..elements]);
    };
    let mut compare = |kind: &'static str, name: &str, tolerance: f64, got: &[f64], expected: &[f64]| {
        comparison.add(&format!("{}: {name} on {isa}", case.name), kind, tolerance, got, expected);
    };
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().copied().map(f64::from).collect() };

    let mut parameters = case.parameters.clone();
    let mut output = vec![0.0; case.input.len()];
    network.pack(&parameters, &mut packed);
    let weights = Weights { parameters: &parameters, packed: &packed };
    network.reconstruct(weights, case.samples as usize, &write, &mut output, &mut workspace);
    compare("output", "output", TOLERANCE, &wide(&output), &wide(&case.output));

    let mut gradient = vec![0.0; network.parameters()];
    let mut losses = Vec::new();
    let mut moments = Moments::zero(network.parameters());
    let mut updated = vec![0.0; network.parameters()];
    for step in 1..=STEPS {
        network.pack(&parameters, &mut packed);
        let weights = Weights { parameters: &parameters, packed: &packed };
        let loss = network.leaf_gradient(weights, case.samples as usize, &write, &mut gradient, &mut workspace);
        losses.push(loss / f64::from(case.samples));
        if step == 1 {
            let mean: Vec<f64> = gradient.iter().map(|&sum| f64::from(sum) / f64::from(case.samples)).collect();
            for entry in case.model.layout.entries() {
                let expected = wide(&case.gradients[entry.range.clone()]);
                compare("gradients", &entry.name, GRADIENT_TOLERANCE, &mean[entry.range.clone()], &expected);
            }
        }
        let slices = AdamSlices {
            parameters: &parameters,
            gradient_sum: &gradient,
            first_moment: &mut moments.first,
            second_moment: &mut moments.second,
            updated: &mut updated,
        };
        adam::apply(isa, Adam::default().step(step, case.samples), slices, &mut SquareSum::default());
        std::mem::swap(&mut parameters, &mut updated);
    }
    for entry in case.model.layout.entries() {
        let expected = wide(&case.adam10[entry.range.clone()]);
        compare("adam10", &entry.name, TRAINED_TOLERANCE, &wide(&parameters[entry.range.clone()]), &expected);
    }
    network.pack(&parameters, &mut packed);
    let weights = Weights { parameters: &parameters, packed: &packed };
    let loss = network.leaf_loss(weights, case.samples as usize, &write, &mut workspace);
    losses.push(loss / f64::from(case.samples));
    for (step, (loss, expected)) in losses.into_iter().zip(&case.losses).enumerate() {
        compare("losses", &format!("loss after {step} steps"), TOLERANCE, &[loss], &[*expected]);
    }
}

/// What differs, over all cases.
#[derive(Default)]
struct Comparison {
    failures: Vec<String>,
    /// For every kind of tensor, the largest relative difference and where it is.
    worst: BTreeMap<&'static str, (f64, String)>,
}

impl Comparison {
    fn add(&mut self, place: &str, kind: &'static str, tolerance: f64, got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len(), "{place}: number of elements");
        let least = if kind == "adam10" { 1.0 } else { f64::MIN_POSITIVE };
        let largest = expected.iter().fold(least, |largest, value| largest.max(value.abs()));
        let relative = |i: usize| (got[i] - expected[i]).abs() / largest;
        // A NaN differs most of all.
        let Some(at) = (0..got.len()).max_by(|&a, &b| relative(a).total_cmp(&relative(b))) else { return };
        let difference = relative(at);
        let worst = self.worst.entry(kind).or_default();
        if difference.total_cmp(&worst.0).is_ge() {
            *worst = (difference, place.to_owned());
        }
        if difference.is_nan() || difference > tolerance {
            self.failures.push(format!(
                "{place} ({kind}): element {at} is {:e}, expected {:e}; with a largest element of {largest:e}, \
                 they differ by {difference:.1e} > {tolerance:e}",
                got[at], expected[at]
            ));
        }
    }
}

/// One model and one training run of it; parameters, gradients and trained parameters in the model's layout.
struct Case {
    name: String,
    model: ResolvedModel,
    loss: Loss,
    samples: u32,
    input: Vec<f32>,
    output: Vec<f32>,
    parameters: Vec<f32>,
    gradients: Vec<f32>,
    adam10: Vec<f32>,
    losses: Vec<f64>,
}

impl Case {
    fn read(model_file: &Path) -> Self {
        let name = model_file.file_stem().expect("a file has a name").to_string_lossy().into_owned();
        let spec = ModelSpec::from_toml(&fs::read_to_string(model_file).unwrap()).unwrap();
        let model = spec.resolve().unwrap_or_else(|error| panic!("{name}: {error}"));
        let bytes = fs::read(model_file.with_extension("safetensors")).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let tensor = |key: &str| tensors.tensor(key).unwrap_or_else(|error| panic!("{name}: {key}: {error}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let loss = match metadata.metadata().as_ref().and_then(|entries| entries.get("loss")).map(String::as_str) {
            Some("mse") => Loss::Mse,
            Some("binary_crossentropy") => Loss::BinaryCrossentropy,
            other => panic!("{name}: unknown loss {other:?}"),
        };
        let flat = |group: &str| -> Vec<f32> {
            let entries = model.layout.entries();
            let wanted: BTreeSet<String> = entries.iter().map(|entry| format!("{group}/{}", entry.name)).collect();
            let found = tensors.names().into_iter().map(String::from).filter(|key| key.starts_with(group)).collect();
            assert_eq!(wanted, found, "{name}: the model's parameters and the file's");
            let mut flat = vec![0.0; model.layout.parameters()];
            for entry in entries {
                let tensor = tensor(&format!("{group}/{}", entry.name));
                assert_eq!(tensor.shape(), entry.shape, "{name}: shape of {group}/{}", entry.name);
                entry.write(&floats(&tensor), &mut flat);
            }
            flat
        };
        let input = tensor("input");
        assert_eq!(&input.shape()[1..], model.input_shape().axes(), "{name}: shape of a sample");
        assert_eq!(tensor("output").shape(), input.shape(), "{name}: shape of the output");
        let losses: Vec<f64> = tensor("losses").data().chunks_exact(8).map(double).collect();
        assert_eq!(losses.len() as u64, STEPS + 1, "{name}: losses before, between and after the steps");
        Self {
            loss,
            samples: input.shape()[0] as u32,
            input: floats(&input),
            output: floats(&tensor("output")),
            parameters: flat("parameters"),
            gradients: flat("gradients"),
            adam10: flat("adam10"),
            losses,
            model,
            name,
        }
    }
}

fn floats(tensor: &TensorView<'_>) -> Vec<f32> {
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn double(bytes: &[u8]) -> f64 {
    f64::from_le_bytes(bytes.try_into().unwrap())
}

fn model_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    files
}
