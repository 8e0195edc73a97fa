//! `lockstep bench`: what this machine can do, and how much of it training uses.

mod clock;
mod layers;
mod machine;
mod report;
mod rounds;
mod step;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use lockstep_common::config::{ModelChoice, RunConfig};
use lockstep_common::kernel::{Arithmetic, Compute, Isa};
use lockstep_common::model::ResolvedModel;
use lockstep_common::nn::{Loss, Network};
use lockstep_common::reduce::Tree;
use rayon::ThreadPool;

use self::clock::Effort;
use self::report::{ModelReport, Report};
use self::rounds::Setting;
use self::step::Batch;
use crate::exit::usage;
use crate::run_args::ComputeArgs;

/// What is measured if nobody says what: the three models of docs/performance.md, and the default one.
const DEFAULT_PRESETS: [&str; 4] = ["article", "dense", "wide", "conv"];

/// Arguments of `lockstep bench`.
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// Preset to measure; may be given several times [default: article, dense, wide and conv]
    #[arg(long, value_name = "NAME")]
    preset: Vec<String>,
    /// Model file (TOML) to measure; may be given several times
    #[arg(long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    parts: Vec<Part>,
    /// Samples in a global batch
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Virtual shards: a power of two, at most the batch size [default: 16, or the batch size if it is less]
    #[arg(long, value_name = "N")]
    shards: Option<u32>,
    /// Measure rounds with so many worker processes, too
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: Option<u32>,
    /// What product-sums are computed from: f32, bf16 or bf16-amx
    #[arg(long = "compute", value_name = "PRECISION", default_value_t)]
    precision: Compute,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Spend a tenth of the time
    #[arg(long)]
    quick: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The machine's multiply-adds
    Peak,
    /// Bandwidth of L2 cache and memory
    Bandwidth,
    /// Each layer's forward pass, weight gradient and input gradient, on one thread
    Layers,
    /// A whole step: pack, leaves and tree, Adam
    Step,
    /// Real rounds of `lockstep train`
    Rounds,
}

impl Part {
    const ALL: [Part; 5] = [Part::Peak, Part::Bandwidth, Part::Layers, Part::Step, Part::Rounds];
}

/// Runs the command.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    let models = models(&args)?;
    let tree = tree(&args)?;
    let threads = args.compute.threads(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().context("cannot start compute threads")?;
    let bench = Bench { batch: Batch { size: args.batch_size, tree }, args, pool };
    let report = bench.measure(&models)?;
    if bench.args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

struct Bench {
    args: BenchArgs,
    batch: Batch,
    pool: ThreadPool,
}

impl Bench {
    fn wants(&self, part: Part) -> bool {
        self.args.parts.contains(&part)
    }

    /// So much time for one figure.
    fn effort(&self) -> Effort {
        Effort { time: Duration::from_millis(if self.args.quick { 100 } else { 1000 }) }
    }

    fn arithmetic(&self) -> Arithmetic {
        Arithmetic { isa: self.args.compute.simd, compute: self.args.precision }
    }

    fn measure(&self, models: &[ResolvedModel]) -> anyhow::Result<Report> {
        let isa = self.args.compute.simd;
        let mut sets = vec![Isa::best()];
        sets.extend((isa != Isa::best()).then_some(isa));
        let (effort, pool) = (self.effort(), &self.pool);
        self.progress("multiply-adds");
        let peaks = if self.wants(Part::Peak) { machine::peaks(&sets, pool, effort) } else { Vec::new() };
        self.progress("bandwidth");
        let bandwidths = if self.wants(Part::Bandwidth) { machine::bandwidths(isa, pool, effort) } else { Vec::new() };
        Ok(Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            isa: isa.name().to_owned(),
            compute: self.args.precision,
            arithmetic: self.arithmetic().to_string(),
            threads: pool.current_num_threads(),
            batch_size: self.batch.size,
            shards: self.batch.tree.shards(),
            peaks,
            bandwidths,
            models: models.iter().map(|model| self.model(model)).collect::<anyhow::Result<_>>()?,
        })
    }

    fn model(&self, model: &ResolvedModel) -> anyhow::Result<ModelReport> {
        let arithmetic = self.arithmetic();
        let network = Network::new(model, Loss::Mse, arithmetic);
        let name = &model.spec.name;
        let layers = if self.wants(Part::Layers) {
            self.progress(&format!("{name}: layers"));
            Some(layers::measure(model, arithmetic, self.batch, self.effort())?)
        } else {
            None
        };
        let step = self.wants(Part::Step).then(|| {
            self.progress(&format!("{name}: step"));
            step::measure(model, arithmetic, self.batch, &self.pool, self.effort())
        });
        let mut rounds = Vec::new();
        if self.wants(Part::Rounds) {
            for workers in std::iter::once(None).chain(self.args.workers.map(Some)) {
                self.progress(&format!("{name}: rounds, {} worker processes", workers.unwrap_or(0)));
                let threads = self.args.compute.threads(workers.unwrap_or(1) as usize);
                let count = if self.args.quick { 20 } else { 200 };
                let setting = Setting { arithmetic, threads, workers, batch: self.batch, rounds: count };
                let report = rounds::measure(model, setting);
                rounds.push(report.with_context(|| format!("cannot measure rounds of model {name:?}"))?);
            }
        }
        Ok(ModelReport {
            name: name.clone(),
            parameters: network.parameters(),
            mflop_per_sample: network.training_flops() as f64 * 1e-6,
            layers,
            step,
            rounds,
        })
    }

    fn progress(&self, what: &str) {
        if !self.args.json {
            eprintln!("measuring {what}");
        }
    }
}

/// The models that the arguments name.
fn models(args: &BenchArgs) -> anyhow::Result<Vec<ResolvedModel>> {
    let mut names = args.preset.clone();
    // A path without a dot or slash would be taken for a preset's name.
    names.extend(args.model.iter().map(|file| Path::new(".").join(file).display().to_string()));
    if names.is_empty() {
        names = DEFAULT_PRESETS.map(str::to_owned).to_vec();
    }
    let resolve = |name: String| {
        let config = RunConfig { model: ModelChoice::Named(name), ..RunConfig::default() };
        let spec = config.model_spec(|path| fs::read_to_string(path)).map_err(|error| usage(anyhow!("{error}")))?;
        spec.resolve().map_err(usage)
    };
    names.into_iter().map(resolve).collect()
}

fn tree(args: &BenchArgs) -> anyhow::Result<Tree> {
    let batch = args.batch_size;
    let shards = args.shards.unwrap_or_else(|| 16.min(1 << batch.ilog2()));
    let tree = Tree::over(shards);
    tree.filter(|_| shards <= batch)
        .ok_or_else(|| usage(anyhow!("--shards is {shards}; it must be a power of two, at most --batch-size {batch}")))
}
