//! Each layer's forward pass, weight gradient and input gradient, as they are in the middle of training, on one thread.

use std::collections::BTreeMap;

use anyhow::Context;
use lockstep_common::kernel::{AlignedFloats, Arithmetic};
use lockstep_common::model::ResolvedModel;
use lockstep_common::nn::{Buffers, Lap, Loss, Network, Weights, initial_parameters, profile};
use lockstep_common::shared_memory::FloatBuffer;
use serde::{Deserialize, Serialize};

use super::clock::{Effort, Measure, thread_time};
use super::machine::Calibration;
use super::step::{Batch, RandomSamples};

/// What was measured of a model's layers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LayersReport {
    /// Samples that were taken through the network at a time, whole leaves.
    pub(super) samples: u32,
    /// Multiply-adds that touch no memory, beside the passes, on one thread.
    pub(super) fma_gflops: Measure,
    /// In the order of the passes.
    pub(super) parts: Vec<PartReport>,
}

/// One part of a pass.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PartReport {
    /// The layer's place, such as `encoder.0.conv2d`; `network` for what belongs to none.
    pub(super) layer: String,
    /// `input` (samples become floats), `forward`, `loss`, `weight gradient` or `input gradient`.
    pub(super) part: String,
    /// For one sample.
    pub(super) microseconds: Measure,
    /// Absent for parts that are no product-sums.
    pub(super) gflops: Option<Measure>,
    /// The medians' ratio.
    pub(super) percent_of_peak: Option<f64>,
}

/// Takes samples through the network and back, again and again, with a look at the clock after each part.
pub(super) fn measure(
    model: &ResolvedModel,
    arithmetic: Arithmetic,
    batch: Batch,
    effort: Effort,
) -> anyhow::Result<LayersReport> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().context("cannot start a compute thread")?;
    Ok(pool.install(|| {
        let network = Network::new(model, Loss::Mse, arithmetic);
        let samples = RandomSamples::new(batch, network.input_elements());
        let parameters = FloatBuffer::from(initial_parameters(&model.layout, 0));
        let mut packed = AlignedFloats::zeros(network.packed_len());
        network.pack(&parameters, &mut packed);
        let weights = Weights { parameters: &parameters, packed: &packed };
        let buffers = Buffers::default();
        let calibration = Calibration::new(arithmetic.isa, &pool);
        let (mut fma, mut times) = (Vec::new(), BTreeMap::<Lap, Vec<f64>>::new());
        let (mut order, mut taken) = (Vec::new(), 0);
        let mut once = |times: &mut BTreeMap<Lap, Vec<f64>>| {
            fma.push(calibration.one_thread());
            let mut laps = BTreeMap::<Lap, f64>::new();
            order.clear();
            let mut last = thread_time();
            taken = profile(&network, weights, batch.tree.root(), &samples, &buffers, &mut |lap| {
                let now = thread_time();
                // A leaf may take several passes.
                if !laps.contains_key(&lap) {
                    order.push(lap);
                }
                *laps.entry(lap).or_default() += (now - last).as_secs_f64();
                last = now;
            });
            for (lap, seconds) in laps {
                times.entry(lap).or_default().push(seconds);
            }
        };
        // The first passes touch new memory.
        (0..2).for_each(|_| once(&mut BTreeMap::new()));
        effort.repeat(|| once(&mut times));
        let fma_gflops = Measure::of(fma);
        let part = |lap: &Lap| part_report(&network, *lap, times.remove(lap).unwrap_or_default(), taken, fma_gflops);
        let parts = order.iter().map(part).collect();
        LayersReport { samples: taken, fma_gflops, parts }
    }))
}

fn part_report(network: &Network, lap: Lap, seconds: Vec<f64>, samples: u32, fma_gflops: Measure) -> PartReport {
    let step = match lap {
        Lap::Input | Lap::Loss => None,
        Lap::Forward(step) | Lap::WeightGradient(step) | Lap::InputGradient(step) => network.step(step),
    };
    let part = match lap {
        Lap::Input => "input",
        Lap::Forward(_) => "forward",
        Lap::Loss => "loss",
        Lap::WeightGradient(_) => "weight gradient",
        Lap::InputGradient(_) => "input gradient",
    };
    let for_one = Measure::of(seconds).scaled(1.0 / f64::from(samples.max(1)));
    let flops = step.map_or(0, |(_, products)| 2 * products) as f64;
    let gflops = (flops > 0.0).then(|| for_one.rate(flops * 1e-9));
    PartReport {
        layer: step.map_or("network".to_owned(), |(place, _)| place.to_string()),
        part: part.to_owned(),
        microseconds: for_one.scaled(1e6),
        percent_of_peak: gflops.map(|gflops| 100.0 * gflops.median / fma_gflops.median),
        gflops,
    }
}
