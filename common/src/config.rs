//! The configuration of a run as people write it, and the [`RunSpec`] that it becomes once everything is checked.

mod cluster;
mod non_finite;
mod precision;

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::data::Dtype;
use crate::model::{self, ModelError, ModelSpec, ResolvedModel, UnknownPreset};
use crate::nn::Loss;
use crate::optim::Adam;
use crate::protocol::Job;
use crate::reduce::Tree;
use crate::shape::Shape;
use crate::shard::{MAX_SAMPLES, Schedule};

pub use cluster::ClusterConfig;
pub use non_finite::{NonFiniteAction, NonFiniteConfig};
pub use precision::PrecisionConfig;

/// A run's configuration: a TOML file, with every key optional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The run's name; its directory is `runs/NAME`. Made from the model's name and the time when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Key of everything random.
    pub seed: u64,
    /// How often the training set is gone through.
    pub epochs: u32,
    /// Ends the run after so many rounds, also within an epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u64>,
    /// Samples in a *global* batch, whatever the number of workers.
    pub batch_size: u32,
    /// Virtual shards: a power of two, and the most workers that the run can use.
    pub shards: u32,
    /// Whether samples are put into random orders.
    pub shuffle: bool,
    /// A safetensors file with the weights to start from, instead of random ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// What is minimised.
    pub loss: Loss,
    /// Which model.
    pub model: ModelChoice,
    /// Adam's settings.
    pub optimizer: Adam,
    /// In which numbers the run computes.
    pub precision: PrecisionConfig,
    /// The data.
    pub data: DataConfig,
    /// Workers and deadlines.
    pub cluster: ClusterConfig,
    /// When checkpoints are written.
    pub checkpoint: CheckpointConfig,
    /// What is done when a loss or a gradient is not finite.
    pub non_finite: NonFiniteConfig,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            name: None,
            seed: 0,
            epochs: 60,
            max_rounds: None,
            batch_size: 128,
            shards: 16,
            shuffle: true,
            init_from: None,
            loss: Loss::Mse,
            model: ModelChoice::Named("conv".to_owned()),
            optimizer: Adam::default(),
            precision: PrecisionConfig::default(),
            data: DataConfig::default(),
            cluster: ClusterConfig::default(),
            checkpoint: CheckpointConfig::default(),
            non_finite: NonFiniteConfig::default(),
        }
    }
}

/// A model by name, or written out.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelChoice {
    /// A preset's name, or the path of a model file.
    Named(String),
    /// The model itself.
    Inline(ModelSpec),
}

impl Serialize for ModelChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Named(name) => name.serialize(serializer),
            Self::Inline(spec) => spec.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ModelChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Not an untagged enum: its message would not say which word of an inline model is wrong.
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(name) => Ok(Self::Named(name)),
            table => ModelSpec::deserialize(table).map(Self::Inline).map_err(serde::de::Error::custom),
        }
    }
}

/// Where the samples come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// `bundled`, `fashion-mnist`, or a path.
    pub source: String,
    /// Path of a validation set. Without it, the last part of the data set is held out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<PathBuf>,
    /// How large that part is, from 0 (none) to below 1.
    pub validation_fraction: f64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { source: "bundled".to_owned(), validation: None, validation_fraction: 0.1 }
    }
}

/// When checkpoints are written: at the end in any case, and as often as any of these says. 0 stands for never. None of
/// this changes the mathematics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// So many seconds after the last one, at the next round's edge.
    pub every_seconds: u32,
    /// After so many rounds.
    pub every_rounds: u32,
    /// After so many epochs.
    pub every_epochs: u32,
    /// How many are kept, so that there is one before the newest if that turns out to be damaged.
    pub keep: u32,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_seconds: 30, every_rounds: 0, every_epochs: 0, keep: 3 }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not TOML, or has a word that does not exist.
    #[error("{origin}: {cause}")]
    Toml {
        /// A file's name, or the command line.
        origin: String,
        /// The parser's message, with the place.
        cause: Box<toml::de::Error>,
    },
    /// `--set` without an equals sign, or into something that is no table.
    #[error("--set {given}: {reason}")]
    Set {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such preset.
    #[error(transparent)]
    Preset(#[from] UnknownPreset),
    /// The model's layers do not fit together.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A value is out of range, or two do not fit together.
    #[error("{0}")]
    Value(String),
}

impl RunConfig {
    /// Reads a configuration from TOML text and applies `key=value` settings (`optimizer.learning_rate=0.01`) to it.
    ///
    /// # Errors
    /// [`ConfigError`] names `origin` and the place in it, or the setting.
    pub fn parse(origin: &str, text: &str, settings: &[String]) -> Result<Self, ConfigError> {
        let toml_error = |cause| ConfigError::Toml { origin: origin.to_owned(), cause: Box::new(cause) };
        // Without settings the text is read directly, so that messages show the line.
        if settings.is_empty() {
            return toml::from_str(text).map_err(toml_error);
        }
        let mut table: toml::Table = toml::from_str(text).map_err(toml_error)?;
        settings.iter().try_for_each(|setting| apply_setting(&mut table, setting))?;
        table.try_into().map_err(|cause| ConfigError::Toml {
            origin: format!("{origin} with --set {}", settings.join(" ")),
            cause: Box::new(cause),
        })
    }

    /// The configuration as TOML text, with every default written out.
    ///
    /// # Errors
    /// When a number does not fit TOML's 64-bit signed integers.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The model that the configuration names: a preset, or what `read_file` gives for a path.
    ///
    /// # Errors
    /// [`ConfigError`] when there is no such preset or file, or it is not a model.
    pub fn model_spec(&self, read_file: impl Fn(&str) -> std::io::Result<String>) -> Result<ModelSpec, ConfigError> {
        match &self.model {
            ModelChoice::Inline(spec) => Ok(spec.clone()),
            ModelChoice::Named(name) if name.contains(['/', '\\', '.']) => {
                let text = read_file(name)
                    .map_err(|error| ConfigError::Value(format!("cannot read the model file {name}: {error}")))?;
                ModelSpec::from_toml(&text)
                    .map_err(|cause| ConfigError::Toml { origin: name.clone(), cause: Box::new(cause) })
            }
            ModelChoice::Named(name) => Ok(model::preset(name)?),
        }
    }

    /// Checks everything against everything.
    ///
    /// # Errors
    /// [`ConfigError`] names the value that cannot be and its numbers.
    pub fn resolve(&self, model: ModelSpec, data: &DataFacts) -> Result<RunSpec, ConfigError> {
        let refuse = |reason: String| Err(ConfigError::Value(reason));
        let Some(name) = self.name.clone().filter(|name| is_plain_name(name)) else {
            return refuse(format!(
                "name is {:?}; a run's name has 1 to 100 letters, digits, '-', '_' or '.', and does not start with '.'",
                self.name.as_deref().unwrap_or("")
            ));
        };
        let model = model.resolve()?;
        if !data.sample_shape.feeds(model.input_shape()) {
            return refuse(format!(
                "the samples of {} have shape {}, but model {:?} takes {}",
                data.name,
                data.sample_shape,
                model.spec.name,
                model.input_shape()
            ));
        }
        let positive = |name: &str, value: u32| {
            NonZeroU32::new(value).ok_or_else(|| ConfigError::Value(format!("{name} is 0; it must be at least 1")))
        };
        let Some(tree) = Tree::over(self.shards) else {
            return refuse(format!("shards is {}; it must be a power of two, at most 65536", self.shards));
        };
        let batch_size = positive("batch_size", self.batch_size)?;
        if batch_size.get() < self.shards {
            return refuse(format!(
                "batch_size {batch_size} is below shards {}: every shard takes part in every batch; raise batch_size or lower shards",
                self.shards
            ));
        }
        let samples = positive("the number of training samples", data.training_samples)?;
        if samples.get() > MAX_SAMPLES {
            return refuse(format!("{samples} training samples are more than a run can have, {MAX_SAMPLES}"));
        }
        if samples.get() < self.shards {
            return refuse(format!("{samples} training samples cannot fill {} shards; lower shards", self.shards));
        }
        if let Some(problem) = self.optimizer.problem() {
            return refuse(format!("optimizer: {problem}"));
        }
        let cluster = &self.cluster;
        if let Some(problem) = cluster.problem(self.shards) {
            return refuse(problem);
        }
        positive("checkpoint.keep", self.checkpoint.keep)?;
        if let Some(problem) = self.non_finite.problem() {
            return refuse(problem);
        }
        let max_rounds = match self.max_rounds {
            Some(0) => return refuse("max_rounds is 0; it must be at least 1".to_owned()),
            other => other.and_then(NonZeroU64::new),
        };
        Ok(RunSpec {
            name,
            epochs: positive("epochs", self.epochs)?,
            max_rounds,
            schedule: Schedule { seed: self.seed, samples, batch_size, tree, shuffle: self.shuffle },
            validation_samples: data.validation_samples,
            sample_shape: data.sample_shape.clone(),
            dtype: data.dtype,
            model,
            loss: self.loss,
            optimizer: self.optimizer,
            precision: self.precision,
            min_workers: cluster.min_workers,
            start_workers: cluster.start_workers.max(cluster.min_workers),
            heartbeat_interval: Duration::from_millis(cluster.heartbeat_interval_ms),
            lease_timeout: Duration::from_millis(cluster.lease_timeout_ms),
            shared_memory: cluster.shared_memory,
            work_timeout: Duration::from_millis(cluster.work_timeout_ms),
            max_workers: cluster.max_workers,
            max_connections: cluster.max_connections,
            max_connections_per_address: cluster.max_connections_per_address,
            checkpoint: self.checkpoint,
            spot_check: cluster.spot_check,
            non_finite: self.non_finite,
        })
    }
}

/// Sets `a.b.c=value` in a table. The value is TOML; what is not TOML is taken as a string.
fn apply_setting(table: &mut toml::Table, setting: &str) -> Result<(), ConfigError> {
    let refuse = |reason: &str| ConfigError::Set { given: setting.to_owned(), reason: reason.to_owned() };
    let (key, value) = setting.split_once('=').ok_or_else(|| refuse("expected KEY=VALUE"))?;
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"));
    let value = match parsed {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value"),
        _ => None,
    };
    let value = value.unwrap_or_else(|| toml::Value::String(setting[key.len() + 1..].to_owned()));
    let mut path = key.split('.').map(str::trim).peekable();
    let mut table = table;
    while let Some(word) = path.next() {
        if word.is_empty() {
            return Err(refuse("a key has an empty part"));
        }
        if path.peek().is_none() {
            table.insert(word.to_owned(), value);
            return Ok(());
        }
        let entry = table.entry(word).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = entry.as_table_mut().ok_or_else(|| refuse("a part of the key is a value, not a table"))?;
    }
    Err(refuse("the key is empty"))
}

/// Whether a run's directory can safely have this name.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= 100 && !name.starts_with('.') && name.chars().all(plain)
}

/// What a run needs to know of its data.
#[derive(Clone, Debug, PartialEq)]
pub struct DataFacts {
    /// For messages.
    pub name: String,
    /// Shape of a sample.
    pub sample_shape: Shape,
    /// Element type.
    pub dtype: Dtype,
    /// Samples to train on.
    pub training_samples: u32,
    /// Samples held out; may be 0.
    pub validation_samples: u32,
}

/// A run whose settings are all checked. Together with the data and the initial parameters it determines every bit of
/// the result.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSpec {
    /// The run's name.
    pub name: String,
    /// How often the training set is gone through.
    pub epochs: NonZeroU32,
    /// Ends the run after so many rounds.
    pub max_rounds: Option<NonZeroU64>,
    /// Which samples each leaf takes in each round.
    pub schedule: Schedule,
    /// Samples held out; may be 0.
    pub validation_samples: u32,
    /// Shape of a sample in the data set.
    pub sample_shape: Shape,
    /// Element type of the data set.
    pub dtype: Dtype,
    /// The model.
    pub model: ResolvedModel,
    /// The loss.
    pub loss: Loss,
    /// The optimizer.
    pub optimizer: Adam,
    /// In which numbers it computes.
    pub precision: PrecisionConfig,
    /// Workers needed for a round.
    pub min_workers: u32,
    /// Workers needed for the first round; at least as many.
    pub start_workers: u32,
    /// How often a worker gives a sign of life.
    pub heartbeat_interval: Duration,
    /// A worker that was silent for so long is evicted.
    pub lease_timeout: Duration,
    /// Whether tensors are exchanged through shared memory where that is possible.
    pub shared_memory: bool,
    /// A worker that has work and delivered nothing for so long is evicted.
    pub work_timeout: Duration,
    /// Members that the run can have at a time.
    pub max_workers: u32,
    /// Connections that its coordinator takes at a time.
    pub max_connections: u32,
    /// How many of them may come from one address.
    pub max_connections_per_address: u32,
    /// When checkpoints are written.
    pub checkpoint: CheckpointConfig,
    /// About one leaf in so many is computed twice and compared; 0 for none.
    pub spot_check: u32,
    /// What is done when a loss or a gradient is not finite.
    pub non_finite: NonFiniteConfig,
}

impl RunSpec {
    /// Rounds after which the run ends.
    pub fn total_rounds(&self) -> u64 {
        let all = u64::from(self.epochs.get()) * u64::from(self.schedule.rounds_per_epoch());
        self.max_rounds.map_or(all, |limit| all.min(limit.get()))
    }

    /// What workers are told.
    pub fn job(&self) -> Job {
        Job {
            run: self.name.clone(),
            model: self.model.spec.clone(),
            layout: self.model.layout.hash(),
            loss: self.loss,
            schedule: self.schedule,
            validation_samples: self.validation_samples,
            sample_shape: self.sample_shape.clone(),
            dtype: self.dtype,
            compute: self.precision.compute,
            wire: self.precision.wire,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> DataFacts {
        DataFacts {
            name: "test data".into(),
            sample_shape: Shape::new([28, 28]),
            dtype: Dtype::U8,
            training_samples: 9000,
            validation_samples: 1000,
        }
    }

    fn resolve(settings: &[&str]) -> Result<RunSpec, ConfigError> {
        let settings: Vec<String> = ["name=test"].iter().chain(settings).map(|s| (*s).to_owned()).collect();
        let config = RunConfig::parse("test", "", &settings)?;
        config.resolve(config.model_spec(|_| Err(std::io::ErrorKind::NotFound.into()))?, &facts())
    }

    #[test]
    fn a_configuration_survives_its_own_text() {
        let mut config = RunConfig { name: Some("x".into()), ..RunConfig::default() };
        config.model = ModelChoice::Inline(model::preset("article").unwrap());
        let text = config.to_toml().unwrap();
        assert_eq!(RunConfig::parse("round trip", &text, &[]).unwrap(), config);
    }

    #[test]
    fn settings_reach_nested_keys_and_strings_need_no_quotes() {
        let settings = ["optimizer.learning_rate=0.01", "model=dense", "data.source=a=b.npy"].map(str::to_owned);
        let config = RunConfig::parse("test", "seed = 4", &settings).unwrap();
        assert_eq!((config.seed, config.optimizer.learning_rate), (4, 0.01));
        assert_eq!(config.model, ModelChoice::Named("dense".into()));
        assert_eq!(config.data.source, "a=b.npy");
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_numbers() {
        fn check(settings: &[&str], expected: &str) {
            let message = resolve(settings).unwrap_err().to_string();
            assert!(message.contains(expected), "{settings:?}: {message}");
        }
        check(&["batch_size=8"], "batch_size 8 is below shards 16");
        check(&["shards=12"], "shards is 12; it must be a power of two");
        check(&["shards=16384", "batch_size=20000"], "9000 training samples cannot fill 16384 shards");
        check(&["epochs=0"], "epochs is 0");
        check(&["max_rounds=0"], "max_rounds is 0");
        check(&["epoch=3"], "epoch");
        check(&["model=vgg"], "no preset is called \"vgg\"");
        check(&["model=missing.toml"], "cannot read the model file missing.toml");
        check(&["name=../up"], "name is \"../up\"");
        check(&["optimizer.beta_1=1.5"], "optimizer: beta_1 is 1.5");
        check(&["cluster.min_workers=17"], "min_workers is 17");
        check(&["cluster.lease_timeout_ms=600"], "lease_timeout_ms is 600");
        check(&["non_finite.rate_factor=1"], "non_finite.rate_factor is 1; it must be above 0 and below 1");
        check(&["non_finite.max_in_a_row=0"], "non_finite.max_in_a_row is 0");
        check(&["non_finite.action=ignore"], "unknown variant `ignore`");
        check(&["cluster.max_workers=2", "cluster.start_workers=3"], "max_workers is 2, but the run waits for 3");
        check(&["cluster.max_connections=0"], "max_connections is 0");
        check(&["checkpoint.keep=0"], "checkpoint.keep is 0; it must be at least 1");
        check(&["precision.compute=f16"], "unknown variant `f16`, expected one of `f32`, `bf16`, `bf16-amx`");
        check(&["epochs"], "expected KEY=VALUE");
        check(&["seed.x=1"], "seed");
        assert_eq!(resolve(&["epochs=2", "batch_size=256"]).unwrap().total_rounds(), 72);
        assert_eq!(resolve(&["max_rounds=5"]).unwrap().total_rounds(), 5);
    }

    #[test]
    fn data_that_does_not_fit_the_model_is_refused() {
        let config = RunConfig { name: Some("x".into()), ..RunConfig::default() };
        let data = DataFacts { sample_shape: Shape::new([32, 32, 3]), ..facts() };
        let error = config.resolve(model::preset("conv").unwrap(), &data).unwrap_err();
        assert_eq!(error.to_string(), "the samples of test data have shape 32x32x3, but model \"conv\" takes 28x28x1");
    }
}
