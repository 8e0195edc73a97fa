//! What a run leaves in its directory when it ends.

use std::io;
use std::path::{Path, PathBuf};

use lockstep_common::config::RunSpec;
use lockstep_common::files;
use lockstep_common::kernel::{Compute, Precision};
use lockstep_common::model_file::{ModelFileError, TrainedModel};
use serde::{Deserialize, Serialize};

use crate::driver::RunResult;
use crate::round::Outcome;

/// Name of the resolved configuration in a run's directory.
pub const CONFIG_FILE: &str = "run.toml";
/// Name of the trained model.
pub const MODEL_FILE: &str = "model.safetensors";
/// Name of the summary.
pub const SUMMARY_FILE: &str = "summary.json";

/// A finished run in numbers: `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// SHA-256 of the flat little-endian parameters in layout order.
    pub params_sha256: String,
    /// Rounds completed.
    pub rounds: u64,
    /// Epochs begun.
    pub epochs: u32,
    /// Training samples used over all rounds.
    pub samples_seen: u64,
    /// Training loss of the last epoch.
    pub train_loss: Option<f64>,
    /// Validation loss at the end.
    pub val_loss: Option<f64>,
    /// Over the whole training time.
    pub samples_per_second: f64,
    /// From the first round's start to the last one's commit.
    pub wall_seconds: f64,
    /// Workers ever admitted.
    pub workers_seen: u32,
    /// Members lost without having drained.
    pub workers_lost: u32,
    /// Virtual shards.
    pub shards: u32,
    /// Samples in a global batch.
    pub batch_size: u32,
    /// Key of everything random.
    pub seed: u64,
    /// What the operands of product-sums were rounded to.
    #[serde(default)]
    pub compute: Compute,
    /// What the gradients of tree nodes, and the parameters of workers, were rounded to.
    #[serde(default)]
    pub wire: Precision,
    /// Name of the model.
    pub model: String,
    /// Number of parameters.
    pub parameters: u64,
    /// How the run ended: `completed`, `stopped` or `failed`.
    pub outcome: String,
    /// Version of the software.
    pub version: String,
}

/// Why a run's results could not be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelFileError),
    /// The summary.
    #[error("cannot write {path}: {cause}", path = path.display())]
    Summary {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        cause: io::Error,
    },
}

/// Writes the model and the summary of a run that has ended. A run that failed leaves the last good parameters.
///
/// # Errors
/// [`OutputError`] when a file cannot be written.
pub fn write(directory: &Path, spec: &RunSpec, result: &RunResult) -> Result<Summary, OutputError> {
    // If it was removed while the run went on, the results are wanted all the same.
    std::fs::create_dir_all(directory).map_err(|cause| OutputError::Summary { path: directory.to_owned(), cause })?;
    let model = TrainedModel {
        model: spec.model.clone(),
        parameters: result.parameters.to_vec(),
        loss: spec.loss.name().to_owned(),
        rounds: result.rounds,
    };
    model.save(&directory.join(MODEL_FILE))?;
    let summary = summarise(spec, result);
    let path = directory.join(SUMMARY_FILE);
    let json = serde_json::to_string_pretty(&summary).map_err(io::Error::other);
    json.and_then(|json| files::replace(&path, |file| writeln!(file, "{json}")))
        .map_err(|cause| OutputError::Summary { path, cause })?;
    Ok(summary)
}

fn summarise(spec: &RunSpec, result: &RunResult) -> Summary {
    let wall_seconds = result.training_time.as_secs_f64();
    let status = &result.status;
    Summary {
        params_sha256: spec.model.layout.sha256(&result.parameters),
        rounds: result.rounds,
        epochs: result.rounds.div_ceil(u64::from(spec.schedule.rounds_per_epoch())) as u32,
        samples_seen: status.samples_seen,
        train_loss: status.train_loss,
        val_loss: status.validation_loss,
        samples_per_second: if wall_seconds > 0.0 { status.samples_seen as f64 / wall_seconds } else { 0.0 },
        wall_seconds,
        workers_seen: result.workers_seen,
        workers_lost: result.workers_lost,
        shards: status.shards,
        batch_size: status.batch_size,
        seed: spec.schedule.seed,
        compute: spec.precision.compute,
        wire: spec.precision.wire,
        model: status.model.clone(),
        parameters: status.parameters,
        outcome: match result.outcome {
            Outcome::Completed => "completed",
            Outcome::Stopped(_) => "stopped",
            Outcome::Failed(_) => "failed",
        }
        .to_owned(),
        version: status.version.clone(),
    }
}
