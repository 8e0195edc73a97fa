//! A whole training step without a coordinator: pack the weights, compute all leaves and add them up, take Adam's step.

use std::time::Instant;

use lockstep_common::kernel::elementwise::{AdamSlices, SquareSum};
use lockstep_common::kernel::{AlignedFloats, Arithmetic};
use lockstep_common::model::ResolvedModel;
use lockstep_common::nn::{Buffers, LeafSource, Loss, Network, NodeSum, Weights, initial_parameters, subtree};
use lockstep_common::optim::Adam;
use lockstep_common::optim::adam::{self, Moments};
use lockstep_common::protocol::CHUNK_FLOATS;
use lockstep_common::reduce::Tree;
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shared_memory::FloatBuffer;
use rayon::ThreadPool;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::clock::{Effort, Measure};
use super::machine::Calibration;

/// The times of a step's parts, all threads together.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StepReport {
    pub(super) pack_ms: Measure,
    /// All leaves, forward and backward, and the reduction tree.
    pub(super) gradient_ms: Measure,
    pub(super) update_ms: Measure,
    pub(super) total_ms: Measure,
    pub(super) samples_per_second: Measure,
    pub(super) gflops: Measure,
    /// Multiply-adds that touch no memory, beside the steps, on as many threads.
    pub(super) fma_gflops: Measure,
    /// The medians' ratio.
    pub(super) percent_of_peak: f64,
}

/// How a batch is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    pub(super) size: u32,
    pub(super) tree: Tree,
}

/// Random samples, divided among the leaves like a batch.
pub(super) struct RandomSamples {
    batch: Batch,
    elements: usize,
    values: Vec<f32>,
}

impl RandomSamples {
    pub(super) fn new(batch: Batch, elements: usize) -> Self {
        let mut stream = Stream::new(0, Purpose::SelfTest, 0, 0);
        // Half of the values are 0, as in pictures.
        let value = |_| (stream.uniform() * 2.0 - 1.0).max(0.0);
        Self { batch, elements, values: (0..batch.size as usize * elements).map(value).collect() }
    }

    /// Sample `i` of the batch.
    pub(super) fn sample(&self, i: usize) -> &[f32] {
        &self.values[i * self.elements..][..self.elements]
    }

    /// The first sample of `leaf`; of the leaf after the last one, the batch's size.
    fn start(&self, leaf: u32) -> u32 {
        (u64::from(self.batch.size) * u64::from(leaf) / u64::from(self.batch.tree.shards())) as u32
    }
}

impl LeafSource for RandomSamples {
    fn samples(&self, leaf: u32) -> u32 {
        self.start(leaf + 1) - self.start(leaf)
    }

    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        out.copy_from_slice(self.sample(self.start(leaf) as usize + i));
    }
}

/// Everything that a step changes.
struct State {
    parameters: FloatBuffer,
    updated: FloatBuffer,
    packed: AlignedFloats,
    moments: Moments,
}

/// Takes training steps and measures them.
pub(super) fn measure(
    model: &ResolvedModel,
    arithmetic: Arithmetic,
    batch: Batch,
    pool: &ThreadPool,
    effort: Effort,
) -> StepReport {
    let network = Network::new(model, Loss::Mse, arithmetic);
    let samples = RandomSamples::new(batch, network.input_elements());
    let buffers = Buffers::default();
    let len = network.parameters();
    let mut state = State {
        parameters: initial_parameters(&model.layout, 0).into(),
        updated: FloatBuffer::zeros(len),
        packed: AlignedFloats::zeros(network.packed_len()),
        moments: Moments::zero(len),
    };
    let calibration = Calibration::new(arithmetic.isa, pool);
    let mut fma = Vec::new();
    let mut seconds: [Vec<f64>; 4] = Default::default();
    let mut step = 0;
    let mut once = || {
        fma.push(calibration.all_threads());
        step += 1;
        let parts = pool.install(|| one_step(&network, &samples, &buffers, &mut state, step));
        for (seconds, part) in seconds.iter_mut().zip(parts.into_iter().chain([parts.iter().sum()])) {
            seconds.push(part);
        }
    };
    // The first steps make the buffers.
    (0..3).for_each(|_| once());
    effort.repeat(&mut once);
    fma.push(calibration.all_threads());
    let [pack, gradient, update, total] = seconds.map(|seconds| Measure::of(seconds[3..].to_vec()));
    let flops = network.training_flops() as f64 * f64::from(batch.size);
    let (gflops, fma_gflops) = (total.rate(flops * 1e-9), Measure::of(fma));
    StepReport {
        pack_ms: pack.scaled(1e3),
        gradient_ms: gradient.scaled(1e3),
        update_ms: update.scaled(1e3),
        total_ms: total.scaled(1e3),
        samples_per_second: total.rate(f64::from(batch.size)),
        percent_of_peak: 100.0 * gflops.median / fma_gflops.median,
        gflops,
        fma_gflops,
    }
}

/// Seconds for packing, for the gradient, for the update.
fn one_step(network: &Network, samples: &RandomSamples, buffers: &Buffers, state: &mut State, step: u64) -> [f64; 3] {
    let State { parameters, updated, packed, moments } = state;
    let started = Instant::now();
    network.pack(parameters, packed);
    let has_packed = Instant::now();
    let root = samples.batch.tree.root();
    let NodeSum { gradient, samples, .. } = subtree(network, Weights { parameters, packed }, root, samples, buffers);
    let has_gradient = Instant::now();
    let adam = Adam::default().step(step, samples);
    updated
        .par_chunks_mut(CHUNK_FLOATS)
        .zip(parameters.par_chunks(CHUNK_FLOATS))
        .zip(gradient.par_chunks(CHUNK_FLOATS))
        .zip(moments.first.par_chunks_mut(CHUNK_FLOATS))
        .zip(moments.second.par_chunks_mut(CHUNK_FLOATS))
        .for_each(|((((updated, parameters), gradient_sum), first_moment), second_moment)| {
            let slices = AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated };
            adam::apply(network.isa(), adam, slices, &mut SquareSum::default());
        });
    std::mem::swap(parameters, updated);
    let done = Instant::now();
    buffers.recycle(gradient);
    [(has_packed - started), (has_gradient - has_packed), (done - has_gradient)].map(|time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_divide_the_batch() {
        let batch = Batch { size: 37, tree: Tree::over(8).unwrap() };
        let samples = RandomSamples::new(batch, 2);
        let sizes: Vec<u32> = (0..8).map(|leaf| samples.samples(leaf)).collect();
        assert_eq!(sizes.iter().sum::<u32>(), 37);
        assert!(sizes.iter().all(|size| [4, 5].contains(size)), "{sizes:?}");
        let mut last = [0.0; 2];
        samples.write(7, sizes[7] as usize - 1, &mut last);
        assert_eq!(last, samples.sample(36));
    }
}
