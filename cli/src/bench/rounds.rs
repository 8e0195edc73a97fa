//! Real rounds: `lockstep train` as anybody would start it, in a directory that goes away afterwards, and what its
//! events say about each round.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use lockstep_common::data::write_npy_f32;
use lockstep_common::kernel::Arithmetic;
use lockstep_common::model::ResolvedModel;
use lockstep_common::progress::{Event, RoundReport, TimedEvent};
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shape::Shape;
use lockstep_coordinator::journal::EVENTS_FILE;
use serde::{Deserialize, Serialize};

use super::clock::Measure;
use super::step::Batch;

/// Rounds before the measured ones: buffers are made, and shards arrive.
const WARM_UP: u64 = 10;

/// A real round's parts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct RoundsReport {
    /// Worker processes; none is one worker inside the process.
    pub(super) workers: Option<u32>,
    pub(super) rounds: usize,
    /// From a round's start to its commit.
    pub(super) round_ms: Measure,
    /// The longest time that a worker computed. This and the following ones are the parts of a round, as
    /// [`Breakdown`](lockstep_common::progress::Breakdown) defines them.
    pub(super) compute_ms: Measure,
    pub(super) transfer_ms: Measure,
    pub(super) reduce_ms: Measure,
    pub(super) update_ms: Measure,
    pub(super) wait_ms: Measure,
    /// Over all measured rounds, with what lies between them.
    pub(super) samples_per_second: f64,
}

/// How `lockstep train` is started.
#[derive(Clone, Copy)]
pub(super) struct Setting {
    pub(super) arithmetic: Arithmetic,
    /// Of each process.
    pub(super) threads: usize,
    pub(super) workers: Option<u32>,
    pub(super) batch: Batch,
    /// Rounds to measure.
    pub(super) rounds: u64,
}

/// Trains for some rounds and reads the events.
pub(super) fn measure(model: &ResolvedModel, setting: Setting) -> anyhow::Result<RoundsReport> {
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let run = directory.path().join("run");
    let model_file = directory.path().join("model.toml");
    fs::write(&model_file, model.spec.to_toml().context("cannot write the model as TOML")?)
        .with_context(|| format!("cannot write {}", model_file.display()))?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut train = Command::new(&program);
    train
        .args(["train", "--json", "--seed", "0", "--set", "data.validation_fraction=0"])
        .args(["--batch-size", &setting.batch.size.to_string()])
        .args(["--shards", &setting.batch.tree.shards().to_string()])
        .args(["--threads", &setting.threads.to_string(), "--simd", setting.arithmetic.isa.name()])
        .args(["--compute", setting.arithmetic.compute.name()])
        .args(["--epochs", &u32::MAX.to_string(), "--max-rounds", &(WARM_UP + setting.rounds).to_string()])
        .arg("--model")
        .arg(&model_file)
        .arg("--out")
        .arg(&run);
    if let Some(workers) = setting.workers {
        train.args(["--workers", &workers.to_string()]);
    }
    if !Shape::new([28, 28]).feeds(model.input_shape()) {
        let data = directory.path().join("samples.npy");
        write_random_samples(&data, setting.batch.size as usize * 8, model.input_shape())?;
        train.arg("--data").arg(data);
    }
    let output = train.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", program.display()))?;
    if !output.status.success() {
        anyhow::bail!(
            "lockstep train ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let events = run.join(EVENTS_FILE);
    let text = fs::read_to_string(&events).with_context(|| format!("cannot read {}", events.display()))?;
    report(&text, setting.workers).with_context(|| format!("in {}", events.display()))
}

fn write_random_samples(path: &Path, count: usize, shape: &Shape) -> anyhow::Result<()> {
    let mut stream = Stream::new(0, Purpose::SelfTest, 1, 0);
    let values: Vec<f32> = (0..count * shape.elements()).map(|_| stream.uniform()).collect();
    let axes: Vec<usize> = std::iter::once(count).chain(shape.axes().iter().copied()).collect();
    write_npy_f32(path, &axes, &values).with_context(|| format!("cannot write {}", path.display()))
}

/// Sums up the rounds in an event log, without those that warm up.
fn report(events: &str, workers: Option<u32>) -> anyhow::Result<RoundsReport> {
    let mut rounds: Vec<(u64, RoundReport)> = Vec::new();
    for line in events.lines() {
        let TimedEvent { unix_ms, event } = serde_json::from_str(line).context("not an event")?;
        if let Event::Round(round) = event {
            rounds.push((unix_ms, round));
        }
    }
    let measured = rounds.get(WARM_UP as usize..).filter(|rounds| rounds.len() > 1);
    let measured = measured.with_context(|| format!("{} rounds are too few to measure any", rounds.len()))?;
    let milliseconds = |part: &dyn Fn(&RoundReport) -> std::time::Duration| {
        Measure::of(measured.iter().map(|(_, round)| part(round).as_secs_f64() * 1e3).collect())
    };
    let (first, last) = (measured[0].0, measured[measured.len() - 1].0);
    let samples: u64 = measured[1..].iter().map(|(_, round)| u64::from(round.samples)).sum();
    Ok(RoundsReport {
        workers,
        rounds: measured.len(),
        round_ms: milliseconds(&|round| round.duration),
        compute_ms: milliseconds(&|round| round.breakdown.compute),
        transfer_ms: milliseconds(&|round| round.breakdown.transfer),
        reduce_ms: milliseconds(&|round| round.breakdown.reduce),
        update_ms: milliseconds(&|round| round.breakdown.update),
        wait_ms: milliseconds(&|round| round.breakdown.wait),
        samples_per_second: samples as f64 * 1e3 / last.saturating_sub(first).max(1) as f64,
    })
}
