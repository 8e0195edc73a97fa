//! The arguments that describe a run, and what they become: a checked spec, placed data, initial parameters and a
//! fresh directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::Args;
use lockstep_common::config::{DataFacts, ModelChoice, RunConfig, RunSpec};
use lockstep_common::data::Dataset;
use lockstep_common::files;
use lockstep_common::kernel::{Compute, Isa, Precision};
use lockstep_common::model::Layout;
use lockstep_common::model_file;
use lockstep_common::nn::{Loss, initial_parameters};
use lockstep_common::placement::PlacedData;
use lockstep_coordinator::aggregate::Start;
use lockstep_coordinator::grpc::Served;
use lockstep_coordinator::outputs::{self, CONFIG_FILE, Summary};
use lockstep_coordinator::round::Outcome;
use lockstep_coordinator::{Coordinator, CoordinatorConfig, Origin, RunResult};

use crate::data_source;
use crate::exit::usage;
use crate::resume::{Begun, Now};

/// What is trained on what, and how.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    /// Configuration file (TOML); the other options override it. A run's own run.toml is one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Model preset: conv, article, dense or wide
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    preset: Option<String>,
    /// Model file (TOML)
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// bundled, fashion-mnist, or the path of an IDX, NPY or NPZ file or of a directory with MNIST's file names
    #[arg(long, value_name = "SOURCE")]
    data: Option<String>,
    /// A file to validate on, instead of the last part of the data
    #[arg(long, value_name = "PATH")]
    validation: Option<PathBuf>,
    /// Name of the run
    #[arg(long)]
    name: Option<String>,
    /// Directory of the run [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in this directory, from its newest whole checkpoint. More epochs or rounds extend it; workers,
    /// deadlines and checkpoints may change, nothing else may
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config"])]
    resume: Option<PathBuf>,
    /// Go on with the run in --out if there is one, and begin it there otherwise: for whoever starts this program again
    /// and again with the same options, such as a container's restart policy
    #[arg(long, requires = "out", conflicts_with = "resume")]
    auto_resume: bool,
    /// Key of everything random
    #[arg(long)]
    seed: Option<u64>,
    /// How often the training set is gone through
    #[arg(long)]
    epochs: Option<u32>,
    /// End after so many rounds
    #[arg(long, value_name = "N")]
    max_rounds: Option<u64>,
    /// Samples in a global batch, whatever the number of workers
    #[arg(long, value_name = "N")]
    batch_size: Option<u32>,
    /// Virtual shards: a power of two, and the most workers that the run can use
    #[arg(long, value_name = "N")]
    shards: Option<u32>,
    /// Adam's step size
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// What product-sums are computed from: f32, or bf16 or bf16-amx, which round activations, weights and derivatives to
    /// bfloat16. Sums and parameters stay f32. bf16 is faster where AVX-512 multiplies bfloat16 at twice the speed (AMD since Zen
    /// 4), bf16-amx where there is AMX (Intel since Sapphire Rapids); each has another result
    #[arg(long, value_name = "PRECISION")]
    compute: Option<Compute>,
    /// What travels between hosts: f32, or bf16, which is half as much. Every node of the reduction tree, and the parameters
    /// that workers compute with, are rounded to it; another result
    #[arg(long, value_name = "PRECISION")]
    wire: Option<Precision>,
    /// mse or binary_crossentropy
    #[arg(long)]
    loss: Option<String>,
    /// Take the samples in the order of the file
    #[arg(long)]
    no_shuffle: bool,
    /// Start from the weights of a safetensors file
    #[arg(long, value_name = "FILE")]
    init_from: Option<PathBuf>,
    /// Wait for so many workers before a round
    #[arg(long, value_name = "N")]
    min_workers: Option<u32>,
    /// Wait for so many workers before the first round
    #[arg(long, value_name = "N")]
    start_workers: Option<u32>,
    /// Set any key of the configuration, such as optimizer.beta_2=0.99
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// A run that can start.
pub(crate) struct Prepared {
    pub(crate) spec: RunSpec,
    pub(crate) data: Arc<PlacedData>,
    pub(crate) training: Arc<Dataset>,
    pub(crate) validation: Option<Arc<Dataset>>,
    pub(crate) directory: PathBuf,
    config: RunConfig,
    /// Whether somebody starts this program again after it was stopped.
    auto_resume: bool,
}

impl RunArgs {
    /// Reads and checks everything. Nothing is written yet. `isa` is what the optimizer computes on.
    pub(crate) fn prepare(&self, isa: Isa) -> anyhow::Result<(Prepared, Origin)> {
        let begun = match (&self.resume, &self.out) {
            (Some(directory), _) => Some(Begun::open(directory)?),
            (None, Some(directory)) if self.auto_resume && Begun::is_in(directory) => Some(Begun::open(directory)?),
            (None, _) => None,
        };
        let mut config = self.config(begun.as_ref())?;
        let model = config.model_spec(|path| fs::read_to_string(path)).map_err(usage)?;
        if config.name.is_none() {
            config.name = Some(self.default_name(&model.name));
        }
        // So that the run's own file says everything, whatever happens to the model's file.
        config.model = ModelChoice::Inline(model.clone());
        let source = &config.data;
        let draws = config.init_from.is_none() && begun.as_ref().is_none_or(Begun::starts_again);
        // To unpack the data takes a while, and so does drawing the parameters of a large model, with memory for its moments.
        let (split, drawn) = rayon::join(
            || data_source::open(&source.source, source.validation.as_deref(), source.validation_fraction),
            || model.resolve().ok().filter(|_| draws).map(|model| drawn_by_seed(&model.layout, config.seed)),
        );
        let split = split?;
        let facts = facts(&split.train, split.validation.as_ref())?;
        let spec = config.resolve(model, &facts).map_err(usage)?;
        let initial = || -> anyhow::Result<Start> {
            let Some(path) = &config.init_from else {
                return Ok(drawn.unwrap_or_else(|| drawn_by_seed(&spec.model.layout, spec.schedule.seed)));
            };
            let parameters = model_file::load_parameters(path, &spec.model.layout).map_err(usage)?;
            Ok(Start::fresh(parameters.into()))
        };
        let directory = self.resume.clone().or_else(|| self.out.clone());
        let directory = directory.unwrap_or_else(|| Path::new("runs").join(&spec.name));
        let (training, validation) = (Arc::new(split.train), split.validation.map(Arc::new));
        let data = Arc::new(PlacedData::new(training.clone(), validation.clone(), spec.schedule));
        let origin = match begun {
            None => {
                check_vacant(&directory)?;
                Origin::Fresh(initial()?)
            }
            Some(begun) => {
                let initial = begun.starts_again().then(initial).transpose()?;
                begun.origin(Now { config: &config, spec: &spec, data: data.digest(), isa, initial })?
            }
        };
        let auto_resume = self.auto_resume;
        Ok((Prepared { spec, data, training, validation, directory, config, auto_resume }, origin))
    }

    fn config(&self, begun: Option<&Begun>) -> anyhow::Result<RunConfig> {
        let (origin, text) = match (begun, &self.config) {
            // With --auto-resume, the options describe the whole run, each time.
            (Some(begun), _) if !self.auto_resume => (CONFIG_FILE.to_owned(), begun.text.clone()),
            (_, Some(path)) => {
                let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
                (path.display().to_string(), text.map_err(usage)?)
            }
            (_, None) => ("the command line".to_owned(), String::new()),
        };
        let mut config = RunConfig::parse(&origin, &text, &self.set).map_err(usage)?;
        self.override_config(&mut config)?;
        Ok(config)
    }

    fn override_config(&self, config: &mut RunConfig) -> anyhow::Result<()> {
        fn put<T: Clone>(place: &mut T, given: &Option<T>) {
            if let Some(given) = given {
                *place = given.clone();
            }
        }
        if let Some(preset) = &self.preset {
            config.model = ModelChoice::Named(preset.clone());
        }
        if let Some(file) = &self.model {
            // A path without a dot or slash would be taken for a preset's name.
            config.model = ModelChoice::Named(Path::new(".").join(file).display().to_string());
        }
        if let Some(loss) = &self.loss {
            config.loss = match loss.as_str() {
                "mse" => Loss::Mse,
                "binary_crossentropy" => Loss::BinaryCrossentropy,
                other => return Err(usage(anyhow::anyhow!("loss {other:?} is neither mse nor binary_crossentropy"))),
            };
        }
        put(&mut config.data.source, &self.data);
        put(&mut config.seed, &self.seed);
        put(&mut config.epochs, &self.epochs);
        put(&mut config.batch_size, &self.batch_size);
        put(&mut config.shards, &self.shards);
        put(&mut config.optimizer.learning_rate, &self.learning_rate);
        put(&mut config.precision.compute, &self.compute);
        put(&mut config.precision.wire, &self.wire);
        put(&mut config.cluster.min_workers, &self.min_workers);
        put(&mut config.cluster.start_workers, &self.start_workers);
        config.max_rounds = self.max_rounds.or(config.max_rounds);
        config.name = self.name.clone().or_else(|| config.name.clone());
        config.data.validation = self.validation.clone().or_else(|| config.data.validation.clone());
        config.init_from = self.init_from.clone().or_else(|| config.init_from.clone());
        config.shuffle &= !self.no_shuffle;
        Ok(())
    }

    /// The name of the run's directory, or the model's name and the first number that is free.
    fn default_name(&self, model: &str) -> String {
        if let Some(name) = self.out.as_ref().and_then(|out| out.file_name()) {
            return name.to_string_lossy().into_owned();
        }
        let plain: String = model.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let taken = |number: &u32| Path::new("runs").join(format!("{plain}-{number}")).exists();
        let number = (1..).find(|number| !taken(number)).unwrap_or(1);
        format!("{plain}-{number}")
    }
}

impl Prepared {
    /// What `--data` takes for the run's samples.
    pub(crate) fn data_source(&self) -> &str {
        &self.config.data.source
    }

    /// Makes the run's directory with its configuration in it, and starts a coordinator.
    pub(crate) fn start(&self, origin: Origin, isa: Isa, remote_workers: bool) -> anyhow::Result<Coordinator> {
        let directory = &self.directory;
        let config = self.config.to_toml().context("cannot write the configuration as TOML")?;
        let fresh = matches!(origin, Origin::Fresh(_));
        if fresh {
            fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
            self.write_config(&config)?;
        }
        let coordinator = Coordinator::start(CoordinatorConfig {
            spec: self.spec.clone(),
            data: self.data.clone(),
            origin,
            directory: directory.clone(),
            config: config.clone(),
            isa,
            remote_workers,
            comes_back: self.auto_resume,
        })?;
        if !fresh {
            // Only now is it certain that no other process goes on with this run.
            self.write_config(&config)?;
        }
        Ok(coordinator)
    }

    fn write_config(&self, text: &str) -> anyhow::Result<()> {
        let path = self.directory.join(CONFIG_FILE);
        files::replace(&path, |file| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Prepared {
    /// How to go on with a run that was stopped.
    pub(crate) fn how_to_go_on(&self, command: &str, result: &RunResult) -> String {
        let how = format!("to go on: lockstep {command} --resume {}", self.directory.display());
        match result.checkpoint {
            Some(rounds) if rounds == result.rounds => how,
            Some(rounds) => format!("{how} (from its newest checkpoint, after round {rounds})"),
            None => format!("{how} (from its beginning: it has no checkpoint)"),
        }
    }

    /// Writes the results of a run that has ended. If that fails, it is not all that is said of a run that has not ended
    /// well.
    pub(crate) fn leave_results(&self, command: &str, result: &RunResult) -> anyhow::Result<Summary> {
        outputs::write(&self.directory, &self.spec, result).map_err(|error| match &result.outcome {
            Outcome::Completed => error.into(),
            Outcome::Stopped(reason) => anyhow!("{}; and {error}", self.stopped(command, result, reason)),
            Outcome::Failed(reason) => anyhow!("{reason}; and {error}"),
        })
    }

    /// Says that a run was stopped, and how it goes on.
    pub(crate) fn stopped(&self, command: &str, result: &RunResult, reason: &str) -> String {
        let (rounds, total, how) = (result.rounds, self.spec.total_rounds(), self.how_to_go_on(command, result));
        format!("stopped after {rounds} of {total} rounds: {reason}; {how}")
    }

    /// What a server of this run serves.
    pub(crate) fn served(&self, coordinator: &Coordinator) -> Served {
        Served {
            inbox: coordinator.inbox(),
            job: self.spec.job(),
            data: self.data.clone(),
            hub: coordinator.hub(),
            region: coordinator.region(),
            max_connections: self.spec.max_connections as usize,
            max_connections_per_address: self.spec.max_connections_per_address as usize,
        }
    }
}

fn check_vacant(directory: &Path) -> anyhow::Result<()> {
    let vacant = match fs::read_dir(directory) {
        // A process that was killed while it wrote its first file has left nothing that counts.
        Ok(mut entries) => entries.all(|entry| entry.is_ok_and(|entry| files::is_partial(&entry.path()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(usage(anyhow::anyhow!("cannot use {}: {error}", directory.display()))),
    };
    if vacant {
        return Ok(());
    }
    let what = if directory.join(CONFIG_FILE).exists() {
        "already holds a run (to go on with it: --resume)"
    } else {
        "is not empty"
    };
    Err(usage(anyhow::anyhow!("{} {what}; choose another --name or --out", directory.display())))
}

fn drawn_by_seed(layout: &Layout, seed: u64) -> Start {
    Start::fresh(initial_parameters(layout, seed).into())
}

fn facts(training: &Dataset, validation: Option<&Dataset>) -> anyhow::Result<DataFacts> {
    let count = |data: &Dataset| {
        u32::try_from(data.len()).map_err(|_| usage(anyhow::anyhow!("{} has more than 2^32 samples", data.name())))
    };
    if let Some(validation) = validation
        && (validation.sample_shape() != training.sample_shape() || validation.dtype() != training.dtype())
    {
        return Err(usage(anyhow::anyhow!(
            "the samples of {} are {} {:?}, those of {} are {} {:?}; training and validation must agree",
            training.name(),
            training.sample_shape(),
            training.dtype(),
            validation.name(),
            validation.sample_shape(),
            validation.dtype()
        )));
    }
    Ok(DataFacts {
        name: training.name().to_owned(),
        sample_shape: training.sample_shape().clone(),
        dtype: training.dtype(),
        training_samples: count(training)?,
        validation_samples: validation.map_or(Ok(0), count)?,
    })
}

/// The most threads that can be asked for. Many more than there are cores take longer to start than to compute.
const MAX_THREADS: i64 = 1024;

/// How a process of this machine computes.
#[derive(Args, Clone, Debug)]
pub(crate) struct ComputeArgs {
    /// Threads of each process that computes; the result is the same [default: all cores, divided among the processes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_THREADS))]
    threads: Option<u16>,
    /// Instruction set: auto, scalar, avx2, avx512 or neon; the result is the same
    #[arg(long, value_name = "SET", default_value = "auto", value_parser = Isa::parse)]
    pub(crate) simd: Isa,
}

impl ComputeArgs {
    /// Threads for each of `processes` processes on this machine.
    pub(crate) fn threads(&self, processes: usize) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(|| (all() / processes.max(1)).max(1), usize::from)
    }
}
