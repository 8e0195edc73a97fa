//! What can be wrong with data.

use std::io;
use std::path::PathBuf;

use super::Dtype;
use crate::shape::Shape;

/// Why data cannot be used.
///
/// Each message is complete, with the cause in it; so there is no `source()` that would make it appear twice.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be opened.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// The content of a file, or the elements of a data set, are not usable.
    #[error("cannot use {name}: {fault}")]
    Content {
        /// The file or data set.
        name: String,
        /// What is wrong with it.
        fault: Fault,
    },
    /// A directory without the files of an MNIST-like data set.
    #[error(
        "the directory {} holds no {wanted}.gz or {wanted}; give a file, or a directory with the MNIST file names",
        directory.display()
    )]
    NotADataDirectory {
        /// The directory.
        directory: PathBuf,
        /// The missing file, without `.gz`.
        wanted: &'static str,
    },
    /// Fashion-MNIST is in none of the usual places.
    #[error(
        "Fashion-MNIST was not found in {}; run `lockstep data fetch`, or `apt install dataset-fashion-mnist`",
        list(places.iter().map(|place| place.display()))
    )]
    NotInstalled {
        /// The directories that were looked into.
        places: Vec<PathBuf>,
    },
    /// A file has the name of a published one, but not its content.
    #[error(
        "{name} is not the published file: its content has SHA-256 {found}, not {expected}; remove it and run \
         `lockstep data fetch`"
    )]
    Checksum {
        /// The file.
        name: String,
        /// SHA-256 of what was published, unpacked.
        expected: &'static str,
        /// SHA-256 of what is there, unpacked.
        found: String,
    },
    /// The validation fraction is not a number in its range.
    #[error("the validation fraction is {0}; it must be at least 0 and below 1")]
    ValidationFraction(f64),
    /// There are too few samples to hold some out.
    #[error(
        "{name} has {samples} sample(s): holding out {held_out} for validation leaves none for training; use a smaller \
         validation fraction, 0 for none"
    )]
    TooFewSamples {
        /// The data set.
        name: String,
        /// How many samples it has.
        samples: usize,
        /// How many would be held out.
        held_out: usize,
    },
    /// The two parts of a split are of different kinds.
    #[error(
        "the validation samples of {validation} are {} {}, but the training samples of {train} are {} {}",
        validation_kind.0, validation_kind.1, train_kind.0, train_kind.1
    )]
    PartsDiffer {
        /// The training data set.
        train: String,
        /// Shape and type of its samples.
        train_kind: (Shape, Dtype),
        /// The validation data set.
        validation: String,
        /// Shape and type of its samples.
        validation_kind: (Shape, Dtype),
    },
}

/// What is wrong with the content of a file or with the elements of a data set.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Reading or unpacking failed.
    #[error("it cannot be read to its end: {0}")]
    Io(#[from] io::Error),
    /// None of the known formats.
    #[error(
        "it {}, so it is neither IDX (00 00 ..), NPY (93 4e 55 4d 50 59), NPZ (50 4b 03 04) nor gzipped IDX or NPY",
        begins_with(start)
    )]
    UnknownFormat {
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// It ends within its header.
    #[error("it ends after {found} of the {expected} bytes of its {format} header; copy or download it again")]
    HeaderTruncated {
        /// The format.
        format: &'static str,
        /// Bytes that the header needs.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// It ends before all elements are there.
    #[error("its header promises {expected} elements, but only {found} follow; copy or download it again")]
    Truncated {
        /// Elements that the header promises.
        expected: usize,
        /// Whole elements that are there.
        found: usize,
    },
    /// It goes on after the last element.
    #[error("its header promises {expected} elements ({expected_bytes} bytes), but more bytes follow them")]
    TrailingBytes {
        /// Elements that the header promises.
        expected: usize,
        /// The same in bytes.
        expected_bytes: usize,
    },
    /// The first bytes are not those of the expected format.
    #[error("it {}, not with the {expected} of {format}", begins_with(found))]
    Magic {
        /// The format.
        format: &'static str,
        /// How such a file begins.
        expected: &'static str,
        /// How it begins.
        found: Vec<u8>,
    },
    /// An IDX element type that is not supported.
    #[error(
        "its IDX element type is 0x{code:02x} ({meaning}); supported are 0x08 (unsigned bytes) and 0x0d (32-bit floats)"
    )]
    IdxType {
        /// The code in the header.
        code: u8,
        /// What the format says that it means.
        meaning: &'static str,
    },
    /// Not samples, but one number for each.
    #[error(
        "its shape is ({samples},): one number per sample, as labels are; samples have shape (n, features), \
         (n, height, width) or (n, height, width, channels)"
    )]
    Labels {
        /// The length of the list.
        samples: usize,
    },
    /// Not one number for each sample, where that was expected.
    #[error("its shape is {}; labels are unsigned bytes of shape (n,)", tuple(axes))]
    NotLabels {
        /// The axes, outermost first.
        axes: Vec<usize>,
    },
    /// A number of axes that samples do not have.
    #[error(
        "its shape is {}; samples have shape (n, features), (n, height, width) or (n, height, width, channels)",
        tuple(axes)
    )]
    Rank {
        /// The axes, outermost first.
        axes: Vec<usize>,
    },
    /// An axis of size zero.
    #[error("its shape is {}: nothing is in it", tuple(axes))]
    ZeroAxis {
        /// The axes, outermost first.
        axes: Vec<usize>,
    },
    /// More elements than can be counted.
    #[error("its shape is {}: more elements than this machine can address", tuple(axes))]
    TooLarge {
        /// The axes, outermost first.
        axes: Vec<usize>,
    },
    /// A version of NPY that does not exist (yet).
    #[error("its NPY version is {major}.{minor}; supported are 1.0, 2.0 and 3.0")]
    NpyVersion {
        /// First part.
        major: u8,
        /// Second part.
        minor: u8,
    },
    /// An NPY header that is not what NumPy writes.
    #[error("its NPY header is malformed: {0}")]
    NpyHeader(String),
    /// An NPY element type that is not supported.
    #[error(
        "its elements are {0}; supported are '|u1' (uint8), '<f4' and '>f4' (float32) and '<f8' (float64): convert with \
         .astype('float32')"
    )]
    NpyDtype(String),
    /// Columns first.
    #[error("its elements are in Fortran order; save it with np.save(file, np.ascontiguousarray(array))")]
    FortranOrder,
    /// The archive is damaged, or uses something that is not supported.
    #[error("it is not a readable NPZ archive: {0}")]
    Zip(#[from] zip::result::ZipError),
    /// An array within the archive is not usable.
    #[error("its array {array}: {fault}")]
    InArchive {
        /// The array's name.
        array: String,
        /// What is wrong with it.
        fault: Box<Fault>,
    },
    /// No array in the archive can be samples.
    #[error("none of its arrays ({}) has samples in it", list(names))]
    NoSamples {
        /// The arrays.
        names: Vec<String>,
    },
    /// Several arrays could be the samples.
    #[error(
        "any of its arrays {} could be meant; save the right one alone, or as x_train, x, images or data",
        list(names)
    )]
    Ambiguous {
        /// The arrays.
        names: Vec<String>,
    },
    /// The elements do not make whole samples.
    #[error("{found} {unit} are not a whole number of samples of {per_sample} {unit} (shape {shape})")]
    NotWhole {
        /// How many there are.
        found: usize,
        /// How many a sample has.
        per_sample: usize,
        /// Elements or bytes.
        unit: &'static str,
        /// A sample's shape.
        shape: Shape,
    },
    /// No samples at all.
    #[error("there are no samples in it")]
    Empty,
    /// Samples are numbered with 32 bits.
    #[error("it has {0} samples; at most {max} can be numbered", max = u32::MAX)]
    TooManySamples(usize),
    /// Training on this would make everything NaN.
    #[error("element {element} of sample {sample} is {value} as a 32-bit float; remove or replace such samples")]
    NotFinite {
        /// The sample, from 0.
        sample: usize,
        /// The element within it, from 0.
        element: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// To be written, but the shape is another.
    #[error("the shape {} has {expected} elements, but {found} are given", tuple(axes))]
    ShapeMismatch {
        /// The axes, outermost first.
        axes: Vec<usize>,
        /// Elements of that shape.
        expected: usize,
        /// Elements given.
        found: usize,
    },
}

impl Fault {
    /// The fault of the file or data set `name`.
    pub(super) fn of(self, name: &str) -> DataError {
        DataError::Content { name: name.to_owned(), fault: self }
    }
}

/// How a file begins, for a person.
fn begins_with(start: &[u8]) -> String {
    let digits: Vec<String> = start.iter().map(|byte| format!("{byte:02x}")).collect();
    if digits.is_empty() { "is empty".to_owned() } else { format!("begins with {}", digits.join(" ")) }
}

/// A shape as Python writes it.
fn tuple(axes: &[usize]) -> String {
    match axes {
        [axis] => format!("({axis},)"),
        _ => format!("({})", list(axes)),
    }
}

fn list(items: impl IntoIterator<Item: ToString>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
