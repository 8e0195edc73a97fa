//! A model's passes over many samples, on all threads.

use anyhow::anyhow;
use lockstep_common::kernel::{AlignedFloats, Isa};
use lockstep_common::model_file::TrainedModel;
use lockstep_common::nn::{Loss, Network, Weights, Workspace, WriteSample};
use rayon::prelude::*;

use crate::exit::usage;

/// Samples that a thread takes at a time. A constant, so that sums are grouped alike for any number of threads.
const BLOCK_SAMPLES: usize = 64;

/// Writes the sample with a given number as a model sees it.
pub(crate) type Read<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// [`Network::encode`] or [`Network::reconstruct`].
type Pass = fn(&Network, Weights<'_>, usize, &WriteSample<'_>, &mut [f32], &mut Workspace);

/// A network with weights. Its methods run in the current rayon pool; their results do not depend on its size.
#[derive(Debug)]
pub(crate) struct Inference<'a> {
    network: Network,
    parameters: &'a [f32],
    packed: AlignedFloats,
}

impl<'a> Inference<'a> {
    /// The passes of a model, with `loss` as the one that is measured.
    pub(crate) fn new(trained: &'a TrainedModel, loss: Loss, isa: Isa) -> Self {
        let network = Network::new(&trained.model, loss, isa);
        let mut packed = AlignedFloats::zeros(network.packed_len());
        network.pack(&trained.parameters, &mut packed);
        Self { network, parameters: &trained.parameters, packed }
    }

    /// The mean loss of `count` samples.
    pub(crate) fn mean_loss(&self, count: usize, read: &Read<'_>) -> f64 {
        let blocks: Vec<f64> = (0..count.div_ceil(BLOCK_SAMPLES))
            .into_par_iter()
            .map_init(
                || self.network.workspace(),
                |workspace, block| {
                    let first = block * BLOCK_SAMPLES;
                    let write = |i: usize, out: &mut [f32]| read(first + i, out);
                    self.network.leaf_loss(self.weights(), BLOCK_SAMPLES.min(count - first), &write, workspace)
                },
            )
            .collect();
        // Not in parallel: addition is not associative.
        blocks.iter().sum::<f64>() / count as f64
    }

    /// The codes of `count` samples: (samples, code elements).
    pub(crate) fn encode(&self, count: usize, read: &Read<'_>) -> anyhow::Result<Vec<f32>> {
        self.map(Network::encode, self.network.code_elements(), count, read)
    }

    /// The reconstructions of `count` samples: (samples, elements).
    pub(crate) fn reconstruct(&self, count: usize, read: &Read<'_>) -> anyhow::Result<Vec<f32>> {
        self.map(Network::reconstruct, self.network.input_elements(), count, read)
    }

    /// What `pass` makes of `count` samples: (samples, `elements`).
    fn map(&self, pass: Pass, elements: usize, count: usize, read: &Read<'_>) -> anyhow::Result<Vec<f32>> {
        let mut output = zeros(count, elements)?;
        output.par_chunks_mut(BLOCK_SAMPLES * elements).enumerate().for_each_init(
            || self.network.workspace(),
            |workspace, (block, output)| {
                let first = block * BLOCK_SAMPLES;
                let write = |i: usize, out: &mut [f32]| read(first + i, out);
                pass(&self.network, self.weights(), output.len() / elements, &write, output, workspace);
            },
        );
        Ok(output)
    }

    fn weights(&self) -> Weights<'_> {
        Weights { parameters: self.parameters, packed: &self.packed }
    }
}

/// Memory for (`count`, `elements`), which a model with a huge code may want too much of.
fn zeros(count: usize, elements: usize) -> anyhow::Result<Vec<f32>> {
    let mut zeros = Vec::new();
    let reserved = count.checked_mul(elements).is_some_and(|floats| {
        let reserved = zeros.try_reserve_exact(floats).is_ok();
        zeros.resize(if reserved { floats } else { 0 }, 0.0);
        reserved
    });
    if !reserved {
        return Err(usage(anyhow!(
            "there is no memory for {count} samples with {elements} values each; take fewer with --split or --data"
        )));
    }
    Ok(zeros)
}

#[cfg(test)]
mod tests {
    use lockstep_common::model::ModelSpec;
    use lockstep_common::nn::initial_parameters;

    use super::*;

    const MODEL: &str = r#"
        name = "tiny"
        input = [6]
        encoder = [{ layer = "dense", units = 2, activation = "relu" }]
        decoder = [{ layer = "dense", units = 6, activation = "sigmoid" }]
    "#;

    /// Not a whole number of blocks.
    const SAMPLES: usize = 2 * BLOCK_SAMPLES + 7;

    fn tiny() -> TrainedModel {
        let model = ModelSpec::from_toml(MODEL).unwrap().resolve().unwrap();
        let parameters = initial_parameters(&model.layout, 1).to_vec();
        TrainedModel { model, parameters, loss: "mse".to_owned(), rounds: 0 }
    }

    fn read(i: usize, out: &mut [f32]) {
        out.iter_mut().enumerate().for_each(|(j, value)| *value = ((i * 7 + j * 3) % 11) as f32 / 10.0);
    }

    /// Scenario: three blocks, the last one short, by one thread and by more threads than blocks.
    /// Property: the same bits, which are those of one pass after the other.
    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let trained = tiny();
        let inference = Inference::new(&trained, Loss::Mse, Isa::best());
        let all = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let codes = inference.encode(SAMPLES, &read).unwrap();
                (codes, inference.reconstruct(SAMPLES, &read).unwrap(), inference.mean_loss(SAMPLES, &read).to_bits())
            })
        };
        let (codes, reconstructions, loss) = all(1);
        assert_eq!(all(5), (codes.clone(), reconstructions.clone(), loss));

        let (network, mut workspace) = (&inference.network, inference.network.workspace());
        let (mut expected_codes, mut expected) = (vec![0.0; SAMPLES * 2], vec![0.0; SAMPLES * 6]);
        network.encode(inference.weights(), SAMPLES, &read, &mut expected_codes, &mut workspace);
        network.reconstruct(inference.weights(), SAMPLES, &read, &mut expected, &mut workspace);
        assert_eq!((codes, reconstructions), (expected_codes, expected));
    }

    #[test]
    fn the_loss_is_the_mean_over_samples_and_elements() {
        let trained = tiny();
        let inference = Inference::new(&trained, Loss::Mse, Isa::best());
        let mut originals = vec![0.0; SAMPLES * 6];
        originals.chunks_exact_mut(6).enumerate().for_each(|(i, out)| read(i, out));
        let reconstructions = inference.reconstruct(SAMPLES, &read).unwrap();
        let squares = originals.iter().zip(&reconstructions).map(|(x, y)| f64::from(x - y).powi(2));
        let expected = squares.sum::<f64>() / originals.len() as f64;
        let loss = inference.mean_loss(SAMPLES, &read);
        assert!((loss - expected).abs() < 1e-7 * expected, "{loss} instead of {expected}");
    }

    #[test]
    fn outputs_that_do_not_fit_in_memory_are_refused() {
        for (count, elements) in [(usize::MAX, 2), (usize::MAX / 16, 1)] {
            let message = zeros(count, elements).unwrap_err().to_string();
            assert!(message.contains(&format!("no memory for {count} samples with {elements} values")), "{message}");
        }
        assert_eq!(zeros(2, 3).unwrap(), [0.0; 6]);
    }
}
