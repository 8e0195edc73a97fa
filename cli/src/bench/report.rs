//! What `lockstep bench` finds out: the JSON document of `--json`, and the tables that people read.

use std::fmt;

use lockstep_common::kernel::Compute;
use serde::{Deserialize, Serialize};

use super::clock::Measure;
use super::layers::LayersReport;
use super::machine::{Bandwidth, Peak};
use super::rounds::RoundsReport;
use super::step::StepReport;
use super::table::Table;

/// Below this part of the peak, a calibration says that something else was using the machine.
const BUSY: f64 = 0.9;

/// The whole document; docs/performance.md describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) version: String,
    pub(super) isa: String,
    /// What the operands of product-sums are rounded to.
    pub(super) compute: Compute,
    /// Both in words, and whether the instruction set has an instruction for it.
    pub(super) arithmetic: String,
    pub(super) threads: usize,
    pub(super) batch_size: u32,
    pub(super) shards: u32,
    pub(super) peaks: Vec<Peak>,
    pub(super) bandwidths: Vec<Bandwidth>,
    pub(super) models: Vec<ModelReport>,
}

/// What was measured of one model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ModelReport {
    pub(super) name: String,
    pub(super) parameters: usize,
    /// Forward and backward, by the layers' definition: what a planner leaves out is counted as if it were done.
    pub(super) mflop_per_sample: f64,
    pub(super) layers: Option<LayersReport>,
    pub(super) step: Option<StepReport>,
    pub(super) rounds: Vec<RoundsReport>,
}

impl Report {
    /// What to say if the multiply-add rate was far below the machine's peak while something was measured.
    fn busy(&self) -> Option<String> {
        let peak = self.peaks.iter().filter(|peak| peak.isa == self.isa && peak.threads == self.threads);
        let peak = peak.map(|peak| peak.gflops.max).fold(0.0, f64::max);
        let steps = self.models.iter().filter_map(|model| model.step.as_ref());
        let rates = steps.map(|step| step.fma_gflops.median).collect::<Vec<_>>();
        let best = rates.iter().copied().fold(peak, f64::max);
        let worst = rates.into_iter().fold(best, f64::min);
        (worst < BUSY * best).then(|| {
            format!(
                "the machine was busy: multiply-adds ran at {worst:.0} GFLOP/s beside a step and at {best:.0} at best; \
                 rates are too low and times too long, percentages less so"
            )
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "lockstep {}, {}, {} threads; medians [least-greatest]",
            self.version, self.arithmetic, self.threads
        )?;
        if !self.peaks.is_empty() {
            let mut table = Table::new(["multiply-adds", "threads", "GFLOP/s"]);
            for Peak { isa, threads, gflops } in &self.peaks {
                table.row([isa.clone(), threads.to_string(), gflops.to_string()]);
            }
            write!(f, "\n{table}")?;
        }
        if !self.bandwidths.is_empty() {
            let mut table = Table::new(["triad over", "threads", "GB/s"]);
            for Bandwidth { threads, bytes_per_thread, gbytes_per_second } in &self.bandwidths {
                let size = format!("{} KiB a thread", bytes_per_thread / 1024);
                table.row([size, threads.to_string(), gbytes_per_second.to_string()]);
            }
            write!(f, "\n{table}")?;
        }
        for model in &self.models {
            writeln!(
                f,
                "\n{}: {} parameters, {:.2} MFLOP a sample",
                model.name, model.parameters, model.mflop_per_sample
            )?;
            if let Some(layers) = &model.layers {
                write_layers(f, layers)?;
            }
            if let Some(step) = &model.step {
                self.write_step(f, step)?;
            }
            if !model.rounds.is_empty() {
                self.write_rounds(f, model)?;
            }
        }
        if let Some(busy) = self.busy() {
            writeln!(f, "\n{busy}")?;
        }
        Ok(())
    }
}

impl Report {
    fn write_step(&self, f: &mut fmt::Formatter<'_>, step: &StepReport) -> fmt::Result {
        let mut table = Table::new([&format!("step, batch {}", self.batch_size), "ms"]);
        table.row(["pack weights".to_owned(), format!("{:.2}", step.pack_ms)]);
        table.row(["leaves and tree".to_owned(), format!("{:.2}", step.gradient_ms)]);
        table.row(["Adam".to_owned(), format!("{:.2}", step.update_ms)]);
        table.row(["whole step".to_owned(), format!("{:.2}", step.total_ms)]);
        write!(f, "\n{table}")?;
        writeln!(
            f,
            "  {:.0} samples/s, {:.1} GFLOP/s, {:.0}% of {:.1} GFLOP/s",
            step.samples_per_second, step.gflops.median, step.percent_of_peak, step.fma_gflops
        )
    }

    fn write_rounds(&self, f: &mut fmt::Formatter<'_>, model: &ModelReport) -> fmt::Result {
        let headings = ["rounds, ms", "compute", "transfer", "reduce", "update", "wait", "whole round", "samples/s"];
        let mut table = Table::new(headings);
        for rounds in &model.rounds {
            let how = match rounds.workers {
                None => "in process".to_owned(),
                Some(1) => "1 worker process".to_owned(),
                Some(workers) => format!("{workers} worker processes"),
            };
            let part = |measure: &Measure| format!("{:.2}", measure.median);
            table.row([
                how,
                part(&rounds.compute_ms),
                part(&rounds.transfer_ms),
                part(&rounds.reduce_ms),
                part(&rounds.update_ms),
                part(&rounds.wait_ms),
                format!("{:.2}", rounds.round_ms),
                format!("{:.0}", rounds.samples_per_second),
            ]);
        }
        write!(f, "\n{table}")
    }
}

fn write_layers(f: &mut fmt::Formatter<'_>, layers: &LayersReport) -> fmt::Result {
    let title = format!("layers, {} samples at a time", layers.samples);
    let mut table = Table::new([&title, "us a sample", "GFLOP/s", "% of peak"]);
    let mut total = 0.0;
    for part in &layers.parts {
        total += part.microseconds.median;
        table.row([
            format!("{} {}", part.layer, part.part),
            format!("{:.2}", part.microseconds),
            part.gflops.as_ref().map_or("-".to_owned(), |gflops| format!("{:.1}", gflops.median)),
            part.percent_of_peak.map_or("-".to_owned(), |percent| format!("{percent:.0}")),
        ]);
    }
    table.row(["together".to_owned(), format!("{total:.2}"), "-".to_owned(), "-".to_owned()]);
    write!(f, "\n{table}")?;
    writeln!(f, "  peak: {:.1} GFLOP/s on one thread", layers.fma_gflops)
}
