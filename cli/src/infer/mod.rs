//! The commands that take a finished model to data: `eval`, `encode` and `reconstruct`.

mod encode;
pub(crate) mod eval;
pub(crate) mod inference;
pub(crate) mod reconstruct;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use indicatif::HumanCount;
use lockstep_common::data::{DataError, Dataset, OpenOptions};
use lockstep_common::model_file::TrainedModel;
use lockstep_common::shape::Shape;
use lockstep_coordinator::outputs::MODEL_FILE;
use serde::Serialize;

pub(crate) use encode::{EncodeArgs, encode};
pub(crate) use eval::{EvalArgs, eval};
pub(crate) use reconstruct::{ReconstructArgs, reconstruct};

use crate::data_source;
use crate::exit::usage;
use crate::run_args::ComputeArgs;

/// Which model meets which data, and how that is computed.
#[derive(Args, Debug)]
struct InferArgs {
    /// A model.safetensors, or the directory of a run that has one
    model: PathBuf,
    /// bundled, fashion-mnist, or the path of an IDX, NPY or NPZ file or of a directory with MNIST's file names
    #[arg(long, value_name = "SOURCE", default_value = "bundled")]
    data: String,
    /// How much of the data counts as held out where it has no test part of its own
    #[arg(long, value_name = "F", default_value_t = OpenOptions::default().validation_fraction)]
    validation_fraction: f64,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Part {
    /// The samples to train on
    Train,
    /// The samples held out
    Validation,
    /// All of them: those to train on, then those held out
    All,
}

impl Part {
    /// For messages: `validation samples`.
    fn describe(self) -> &'static str {
        match self {
            Self::Train => "training samples",
            Self::Validation => "validation samples",
            Self::All => "samples",
        }
    }
}

impl InferArgs {
    /// The model: the file itself, or the one in the directory of a run.
    fn load_model(&self) -> anyhow::Result<TrainedModel> {
        let directory = self.model.is_dir();
        let path = if directory { self.model.join(MODEL_FILE) } else { self.model.clone() };
        if directory && !path.exists() {
            let directory = self.model.display();
            return Err(usage(anyhow!("{directory} has no {MODEL_FILE}: it is no directory of a run that has ended")));
        }
        // Not as a source: the error contains its causes.
        TrainedModel::load(&path).map_err(|error| usage(anyhow!("{error}")))
    }

    /// The samples of a part, which `model` can take.
    fn load_samples(&self, part: Part, model: &TrainedModel) -> anyhow::Result<Samples> {
        // When all are wanted it does not matter which are held out, and there need not be enough of them.
        let fraction = if part == Part::All { 0.0 } else { self.validation_fraction };
        let split = data_source::open(&self.data, None, fraction)?;
        let (shape, input) = (split.train.sample_shape(), model.model.input_shape());
        if !shape.feeds(input) {
            return Err(usage(anyhow!(
                "the samples of {} have shape {shape}, but model {:?} takes {input}",
                split.train.name(),
                model.model.spec.name
            )));
        }
        if part == Part::Validation && split.validation.is_none() {
            return Err(usage(anyhow!(
                "with --validation-fraction 0, none of {} are held out; use --split all",
                split.train.name()
            )));
        }
        Ok(Samples::new(Arc::new(split.train), split.validation.map(Arc::new), part))
    }

    /// The threads to compute with.
    fn thread_pool(&self) -> anyhow::Result<rayon::ThreadPool> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.compute.threads(1)).build();
        pool.context("cannot start the threads to compute with; try fewer: --threads N")
    }
}

/// The samples of a source, and which of them a command is about.
#[derive(Debug)]
pub(crate) struct Samples {
    train: Arc<Dataset>,
    validation: Option<Arc<Dataset>>,
    part: Part,
}

impl Samples {
    /// A part of these data sets, which must not be empty.
    pub(crate) fn new(train: Arc<Dataset>, validation: Option<Arc<Dataset>>, part: Part) -> Self {
        Self { train, validation, part }
    }

    /// The data sets that the part consists of.
    fn datasets(&self) -> impl Iterator<Item = &Dataset> + Clone {
        let train = (self.part != Part::Validation).then_some(&*self.train);
        let validation = self.validation.as_deref().filter(|_| self.part != Part::Train);
        train.into_iter().chain(validation)
    }

    /// The number of samples in the part, at least 1.
    fn len(&self) -> usize {
        self.datasets().map(Dataset::len).sum()
    }

    /// The shape of a sample.
    fn shape(&self) -> &Shape {
        self.train.sample_shape()
    }

    /// How many samples of what, for messages.
    fn describe(&self) -> String {
        format!("{} {} of {}", HumanCount(self.len() as u64), self.part.describe(), self.name())
    }

    /// Where the samples come from, for messages.
    fn name(&self) -> String {
        self.datasets().map(Dataset::name).collect::<Vec<_>>().join(" and ")
    }

    /// Writes sample `index` of the part as a model sees it.
    fn write(&self, index: usize, out: &mut [f32]) {
        let mut index = index;
        for dataset in self.datasets() {
            if index < dataset.len() {
                return dataset.sample(index).write_f32(out);
            }
            index -= dataset.len();
        }
        panic!("a sample {index} places behind the last of {}", self.name());
    }
}

/// The axes of an array of `count` samples.
fn batch_axes(count: usize, sample: &Shape) -> Vec<usize> {
    [&[count], sample.axes()].concat()
}

/// Checks before anything is computed that a file can be written where it is wanted.
fn check_writable(out: &Path) -> anyhow::Result<()> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Err(usage(anyhow!("cannot write {}: there is no directory {}", out.display(), parent.display())));
    }
    if out.is_dir() {
        return Err(usage(anyhow!("cannot write {}: it is a directory", out.display())));
    }
    Ok(())
}

/// The ending of a file's name, in lower case; empty if there is none.
fn extension(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

/// An error of writing is a failure; others are the user's to mend.
fn data_error(error: DataError) -> anyhow::Error {
    if matches!(error, DataError::Write { .. }) { error.into() } else { usage(error) }
}

#[cfg(test)]
mod tests {
    use lockstep_common::data::Elements;

    use super::*;

    fn samples(part: Part) -> Samples {
        let dataset = |name, values| Dataset::new(name, Shape::new([1]), Elements::F32(values)).unwrap();
        let validation = dataset("b", vec![2.0, 3.0, 4.0]);
        Samples::new(Arc::new(dataset("a", vec![0.0, 1.0])), Some(Arc::new(validation)), part)
    }

    #[test]
    fn a_part_is_numbered_from_0() {
        let check = |part, expected: &[f32], name: &str| {
            let samples = samples(part);
            let mut found = vec![0.0; samples.len()];
            found.chunks_exact_mut(1).enumerate().for_each(|(index, out)| samples.write(index, out));
            assert_eq!((found.as_slice(), samples.name().as_str()), (expected, name));
        };
        check(Part::Train, &[0.0, 1.0], "a");
        check(Part::Validation, &[2.0, 3.0, 4.0], "b");
        check(Part::All, &[0.0, 1.0, 2.0, 3.0, 4.0], "a and b");
    }

    #[test]
    fn places_that_cannot_be_written_are_found_early() {
        let directory = tempfile::tempdir().unwrap();
        let check = |path: &str, expected: &str| {
            let error = check_writable(&directory.path().join(path)).unwrap_err();
            assert!(error.is::<crate::exit::Usage>());
            assert!(error.to_string().contains(expected), "{error}");
        };
        check("no/such/codes.npy", "there is no directory ");
        check("", "it is a directory");
        check_writable(&directory.path().join("codes.npy")).unwrap();
        check_writable(Path::new("codes.npy")).unwrap();
    }
}
