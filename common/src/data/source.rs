//! Where samples come from, and which of them are held out.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{DataError, Dataset, fashion_mnist, read};

/// Where samples come from, as people write it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// `bundled`: the 10,000 Fashion-MNIST test images that are part of the program.
    #[default]
    Bundled,
    /// `fashion-mnist`: the whole of it, as it is found on this machine.
    FashionMnist,
    /// Anything else: a file, or a directory with MNIST's file names. A file called `bundled` is `./bundled`.
    Path(PathBuf),
}

impl From<&str> for Source {
    fn from(text: &str) -> Self {
        match text {
            "bundled" => Self::Bundled,
            "fashion-mnist" => Self::FashionMnist,
            path => Self::Path(path.into()),
        }
    }
}

impl FromStr for Source {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.into())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bundled => f.write_str("bundled"),
            Self::FashionMnist => f.write_str("fashion-mnist"),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// How to [`open`] a source.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenOptions {
    /// A file with the validation samples, instead of any that the source has.
    pub validation: Option<PathBuf>,
    /// Which part of the samples is held out where there is no validation set: from 0 (none) to below 1. It is rounded
    /// to whole samples, but at least one.
    pub validation_fraction: f64,
    /// Where to look for Fashion-MNIST first.
    pub fashion_mnist_directory: Option<PathBuf>,
    /// Where `lockstep data fetch` puts Fashion-MNIST: looked into last.
    pub fashion_mnist_cache: Option<PathBuf>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { validation: None, validation_fraction: 0.1, fashion_mnist_directory: None, fashion_mnist_cache: None }
    }
}

impl OpenOptions {
    /// The directories in which Fashion-MNIST is looked for, in this order.
    pub fn fashion_mnist_places(&self) -> Vec<PathBuf> {
        let debian = Some(PathBuf::from(fashion_mnist::DEBIAN_DIRECTORY));
        [self.fashion_mnist_directory.clone(), debian, self.fashion_mnist_cache.clone()].into_iter().flatten().collect()
    }
}

/// Samples to train and to validate with: of one shape and one type.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// To train with; at least one.
    pub train: Dataset,
    /// To validate with; at least one, if any.
    pub validation: Option<Dataset>,
}

/// Reads the samples of a source. Validation samples are, in this order: the file that the options name; the test part
/// of a data set that has one (`fashion-mnist`, or a directory); the last part of the samples.
///
/// # Errors
/// [`DataError`] when something cannot be found or used, when the options are out of range, or when the two parts of
/// the split do not fit together.
pub fn open(source: &Source, options: &OpenOptions) -> Result<Split, DataError> {
    let fraction = options.validation_fraction;
    if !(0.0..1.0).contains(&fraction) {
        return Err(DataError::ValidationFraction(fraction));
    }
    let mut split = match source {
        Source::Bundled => Split { train: fashion_mnist::bundled_images()?, validation: None },
        Source::FashionMnist => fashion_mnist::read(&options.fashion_mnist_places())?,
        Source::Path(path) if path.is_dir() => fashion_mnist::read_directory(path)?,
        Source::Path(path) => Split { train: read(path)?, validation: None },
    };
    if let Some(path) = &options.validation {
        split.validation = Some(read(path)?);
    }
    match split {
        Split { train, validation: Some(validation) } => paired(train, validation),
        Split { train, validation: None } => hold_out(train, fraction),
    }
}

/// A split of two data sets, which must be of one kind.
fn paired(train: Dataset, validation: Dataset) -> Result<Split, DataError> {
    let kind = |dataset: &Dataset| (dataset.sample_shape().clone(), dataset.dtype());
    if kind(&train) != kind(&validation) {
        return Err(DataError::PartsDiffer {
            train: train.name().to_owned(),
            train_kind: kind(&train),
            validation: validation.name().to_owned(),
            validation_kind: kind(&validation),
        });
    }
    Ok(Split { train, validation: Some(validation) })
}

/// Holds out the last part of `samples`. `fraction`: from 0 to below 1.
fn hold_out(samples: Dataset, fraction: f64) -> Result<Split, DataError> {
    if fraction == 0.0 {
        return Ok(Split { train: samples, validation: None });
    }
    // Rounded, not cut off: 0.29 * 100 is 28.999999999999996.
    let held_out = ((samples.len() as f64 * fraction).round() as usize).max(1);
    if held_out >= samples.len() {
        return Err(DataError::TooFewSamples { name: samples.name().to_owned(), samples: samples.len(), held_out });
    }
    let (train, validation) = samples.split_tail(held_out);
    Ok(Split { train, validation: Some(validation) })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::data::idx::tests::idx;
    use crate::data::{Elements, write_npy_f32};
    use crate::shape::Shape;

    /// Writes `samples` samples of shape 2 to an NPY file.
    fn npy_file(directory: &Path, name: &str, samples: usize) -> PathBuf {
        let path = directory.join(name);
        let elements: Vec<f32> = (0..2 * samples).map(|number| number as f32).collect();
        write_npy_f32(&path, &[samples, 2], &elements).unwrap();
        path
    }

    fn lengths(split: &Split) -> (usize, Option<usize>) {
        (split.train.len(), split.validation.as_ref().map(Dataset::len))
    }

    #[test]
    fn sources_are_what_people_write() {
        let path = |path: &str| Source::Path(path.into());
        for (text, source) in [
            ("bundled", Source::Bundled),
            ("fashion-mnist", Source::FashionMnist),
            ("./bundled", path("./bundled")),
            ("samples.npy", path("samples.npy")),
        ] {
            assert_eq!(text.parse::<Source>().unwrap(), source);
            assert_eq!(source.to_string(), text);
        }
        assert_eq!(Source::default(), Source::Bundled);
    }

    #[test]
    fn the_bundled_sample_is_split_into_9000_and_1000() {
        let split = open(&Source::Bundled, &OpenOptions::default()).unwrap();
        assert_eq!(lengths(&split), (9_000, Some(1_000)));
        let (all, validation) = (fashion_mnist::bundled_images().unwrap(), split.validation.unwrap());
        assert_eq!(validation.sample(999), all.sample(9_999));
        assert_eq!(split.train.sample_shape(), &Shape::new([28, 28]));
    }

    #[test]
    fn the_last_part_of_a_file_is_held_out() {
        let directory = tempfile::tempdir().unwrap();
        let check = |samples: usize, validation_fraction: f64, expected: (usize, Option<usize>)| {
            let source = Source::Path(npy_file(directory.path(), "samples.npy", samples));
            let split = open(&source, &OpenOptions { validation_fraction, ..OpenOptions::default() }).unwrap();
            assert_eq!(lengths(&split), expected, "{samples} samples, fraction {validation_fraction}");
            assert_eq!(split.train.sample(0), crate::data::SampleView::F32(&[0.0, 1.0]));
        };
        check(100, 0.1, (90, Some(10)));
        check(100, 0.29, (71, Some(29)));
        check(100, 0.0, (100, None));
        check(3, 0.1, (2, Some(1)));
        check(1, 0.0, (1, None));
    }

    #[test]
    fn a_separate_validation_file_replaces_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let source = Source::Path(npy_file(directory.path(), "train.npy", 10));
        let validation = Some(npy_file(directory.path(), "validation.npy", 3));
        let split = open(&source, &OpenOptions { validation, ..OpenOptions::default() }).unwrap();
        assert_eq!(lengths(&split), (10, Some(3)));
    }

    #[test]
    fn a_directory_is_read_by_mnist_file_names() {
        let directory = tempfile::tempdir().unwrap();
        let source = Source::Path(directory.path().to_owned());
        let check = |expected| assert_eq!(lengths(&open(&source, &OpenOptions::default()).unwrap()), expected);

        let message = open(&source, &OpenOptions::default()).unwrap_err().to_string();
        assert!(message.contains("holds no train-images-idx3-ubyte.gz or train-images-idx3-ubyte;"), "{message}");
        fs::write(directory.path().join("train-images-idx3-ubyte"), idx(8, &[10, 1, 1], &[1; 10])).unwrap();
        check((9, Some(1)));
        fs::write(directory.path().join("t10k-images-idx3-ubyte"), idx(8, &[4, 1, 1], &[1; 4])).unwrap();
        check((10, Some(4)));
    }

    #[test]
    fn what_cannot_be_split_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let source = Source::Path(npy_file(directory.path(), "train.npy", 2));
        let check = |options: OpenOptions, expected: &str| {
            let message = open(&source, &options).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        let fraction = |validation_fraction| OpenOptions { validation_fraction, ..OpenOptions::default() };
        for (value, word) in [(1.0, "1"), (-0.1, "-0.1"), (f64::NAN, "NaN")] {
            check(fraction(value), &format!("the validation fraction is {word}; it must be at least 0 and below 1"));
        }
        check(fraction(0.9), "train.npy has 2 sample(s): holding out 2 for validation leaves none");

        let bytes = directory.path().join("bytes");
        fs::write(&bytes, idx(8, &[1, 2], &[1, 2])).unwrap();
        let expected = format!("the validation samples of {} are 2 u8, but the training samples of ", bytes.display());
        check(OpenOptions { validation: Some(bytes), ..OpenOptions::default() }, &expected);
        let missing = directory.path().join("missing");
        let expected = format!("cannot read {}: ", missing.display());
        check(OpenOptions { validation: Some(missing), ..OpenOptions::default() }, &expected);
    }

    #[test]
    fn fashion_mnist_is_looked_for_in_order() {
        let options = OpenOptions {
            fashion_mnist_directory: Some("first".into()),
            fashion_mnist_cache: Some("last".into()),
            ..OpenOptions::default()
        };
        let places: Vec<PathBuf> = ["first", fashion_mnist::DEBIAN_DIRECTORY, "last"].map(PathBuf::from).to_vec();
        assert_eq!(options.fashion_mnist_places(), places);
    }

    #[test]
    fn held_out_samples_keep_their_elements() {
        let samples = Dataset::new("d", Shape::new([1]), Elements::U8(vec![1, 2, 3, 4])).unwrap();
        let split = hold_out(samples, 0.25).unwrap();
        assert_eq!(split.validation.unwrap().elements(), &Elements::U8(vec![4]));
    }
}
