//! Fashion-MNIST (Zalando Research, MIT licence): 70,000 grey images of clothes, 28 by 28 pixels, ten classes.
//!
//! Its 10,000 test images are part of the program ("bundled"). The whole set is looked for on this machine; it is
//! recognised by the SHA-256 of its *content*, since distributions pack the same bytes with other gzip headers.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{DataError, Dataset, Fault, Split, idx, input};

/// Where Debian's package `dataset-fashion-mnist` puts the files.
pub const DEBIAN_DIRECTORY: &str = "/usr/share/datasets/fashion-mnist";

/// What the labels 0 to 9 mean.
pub const CLASS_NAMES: [&str; 10] =
    ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"];

/// A file as it was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedFile {
    /// Its name, without `.gz`.
    pub name: &'static str,
    /// The size of its content, unpacked.
    pub content_bytes: u64,
    /// SHA-256 of its content, unpacked, as hexadecimal digits.
    pub content_sha256: &'static str,
}

/// The images of the training part: 60,000.
pub const TRAIN_IMAGES: PublishedFile = PublishedFile {
    name: "train-images-idx3-ubyte",
    content_bytes: 47_040_016,
    content_sha256: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
};

/// The labels of the training part.
pub const TRAIN_LABELS: PublishedFile = PublishedFile {
    name: "train-labels-idx1-ubyte",
    content_bytes: 60_008,
    content_sha256: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
};

/// The images of the test part: 10,000.
pub const TEST_IMAGES: PublishedFile = PublishedFile {
    name: "t10k-images-idx3-ubyte",
    content_bytes: 7_840_016,
    content_sha256: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
};

/// The labels of the test part.
pub const TEST_LABELS: PublishedFile = PublishedFile {
    name: "t10k-labels-idx1-ubyte",
    content_bytes: 10_008,
    content_sha256: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
};

/// All files, as `lockstep data fetch` gets them.
pub const FILES: [PublishedFile; 4] = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS];

static BUNDLED_IMAGES: &[u8] = include_bytes!("../../../data/fashion-mnist/t10k-images-idx3-ubyte.gz");
static BUNDLED_LABELS: &[u8] = include_bytes!("../../../data/fashion-mnist/t10k-labels-idx1-ubyte.gz");

/// The bundled images: 10,000 samples of 28x28 u8.
///
/// # Errors
/// Only if the program was built with damaged files.
pub fn bundled_images() -> Result<Dataset, DataError> {
    idx::read("the bundled Fashion-MNIST images", BUNDLED_IMAGES)
}

/// The labels of the bundled images: 10,000 numbers below 10, for [`CLASS_NAMES`].
///
/// # Errors
/// Only if the program was built with damaged files.
pub fn bundled_labels() -> Result<Vec<u8>, DataError> {
    idx::read_labels("the bundled Fashion-MNIST labels", BUNDLED_LABELS)
}

/// Reads the whole of Fashion-MNIST, 60,000 images to train and 10,000 to validate, from the first of the directories
/// that has them, and checks that they are what was published.
///
/// # Errors
/// [`DataError::NotInstalled`] when none has them, [`DataError::Checksum`] when they were changed.
pub fn read(places: &[PathBuf]) -> Result<Split, DataError> {
    places
        .iter()
        .find_map(|place| Some((find(place, TRAIN_IMAGES.name)?, find(place, TEST_IMAGES.name)?)))
        .ok_or_else(|| DataError::NotInstalled { places: places.to_vec() })
        .and_then(|(train, validation)| {
            Ok(Split {
                train: TRAIN_IMAGES.read_images(&train)?,
                validation: Some(TEST_IMAGES.read_images(&validation)?),
            })
        })
}

/// Reads whatever data set has the file names of MNIST in `directory`. There may be no test images.
///
/// # Errors
/// [`DataError`] when there are no training images, or a file cannot be used.
pub fn read_directory(directory: &Path) -> Result<Split, DataError> {
    let train = find(directory, TRAIN_IMAGES.name)
        .ok_or_else(|| DataError::NotADataDirectory { directory: directory.to_owned(), wanted: TRAIN_IMAGES.name })?;
    let validation = find(directory, TEST_IMAGES.name).map(|path| super::read(&path)).transpose()?;
    Ok(Split { train: super::read(&train)?, validation })
}

/// The file of that name in `directory`, gzipped or not.
fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    [directory.join(format!("{name}.gz")), directory.join(name)].into_iter().find(|path| path.is_file())
}

impl PublishedFile {
    /// The name under which it is published, packed.
    pub fn packed_name(&self) -> String {
        format!("{}.gz", self.name)
    }

    /// Checks that a file, gzipped or not, has the published content. `name` is for messages.
    ///
    /// # Errors
    /// [`DataError::Checksum`] when it has another, [`DataError::Content`] when it cannot be read.
    pub fn check(&self, name: &str, file: impl Read) -> Result<(), DataError> {
        self.read_checked(name, file, |_| ())
    }

    /// Reads images, and checks that they are the published ones.
    fn read_images(&self, path: &Path) -> Result<Dataset, DataError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
        self.read_checked(&name, BufReader::new(file), |content| idx::read(&name, content))?
    }

    /// What `read` makes of the content, once that is found to be the published one.
    fn read_checked<T>(
        &self,
        name: &str,
        file: impl Read,
        read: impl FnOnce(&mut dyn Read) -> T,
    ) -> Result<T, DataError> {
        let in_file = |cause| Fault::Io(cause).of(name);
        // One byte more than expected is enough to find that it is not the published file, however long it goes on.
        let content = input::unpacked(file).map_err(in_file)?.take(self.content_bytes + 1);
        let mut hashing = Hashing { content, sha256: Sha256::new() };
        let result = read(&mut hashing);
        // The sum comes first: a reader's complaint about damaged content would say less.
        io::copy(&mut hashing, &mut io::sink()).map_err(in_file)?;
        let found: String = hashing.sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != self.content_sha256 {
            return Err(DataError::Checksum { name: name.to_owned(), expected: self.content_sha256, found });
        }
        Ok(result)
    }
}

/// Passes on what it reads, and hashes it.
struct Hashing<R> {
    content: R,
    sha256: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(buffer)?;
        self.sha256.update(&buffer[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::idx::tests::idx as idx_file;
    use crate::data::input::tests::gzip;
    use crate::data::{Elements, SampleView};
    use crate::shape::Shape;

    /// Sums of what the string "abc" hashes to, from FIPS 180-2.
    const ABC: PublishedFile = PublishedFile {
        name: "abc",
        content_bytes: 3,
        content_sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    #[test]
    fn the_bundled_images_are_the_published_test_images() {
        TEST_IMAGES.check("bundled", BUNDLED_IMAGES).unwrap();
        TEST_LABELS.check("bundled", BUNDLED_LABELS).unwrap();
        let images = bundled_images().unwrap();
        assert_eq!((images.len(), images.sample_shape()), (10_000, &Shape::new([28, 28])));
        let SampleView::U8(ankle_boot) = images.sample(0) else { panic!("pixels are bytes") };
        assert_eq!(ankle_boot.iter().map(|&pixel| u32::from(pixel)).sum::<u32>(), 33_456);
        let Elements::U8(pixels) = images.elements() else { panic!("pixels are bytes") };
        assert_eq!(pixels.iter().map(|&pixel| u64::from(pixel)).sum::<u64>(), 573_469_082);
        let labels = bundled_labels().unwrap();
        assert_eq!((labels.len(), CLASS_NAMES[usize::from(labels[0])]), (10_000, "Ankle boot"));
    }

    #[test]
    fn content_is_checked_whatever_it_is_packed_in() {
        ABC.check("file", &b"abc"[..]).unwrap();
        ABC.check("file", gzip(b"abc").as_slice()).unwrap();
        for other in [&b"abd"[..], b"ab", b"abcabc", b""] {
            let error = ABC.check("file", gzip(other).as_slice()).unwrap_err();
            let message = error.to_string();
            assert!(message.starts_with("file is not the published file: its content has SHA-256"), "{message}");
            assert!(message.contains(ABC.content_sha256) && message.contains("lockstep data fetch"), "{message}");
        }
        let cut = gzip(b"abc");
        assert!(matches!(ABC.check("file", &cut[..cut.len() - 9]), Err(DataError::Content { .. })));
    }

    #[test]
    fn a_changed_file_is_refused_and_a_missing_one_looked_for_elsewhere() {
        let (empty, changed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let places = [empty.path().to_owned(), changed.path().to_owned()];
        // One of the two files does not make the data set.
        fs::write(changed.path().join("train-images-idx3-ubyte.gz"), gzip(&idx_file(8, &[1, 1], &[1]))).unwrap();
        let message = read(&places).unwrap_err().to_string();
        assert!(message.contains(&format!("{}, {};", places[0].display(), places[1].display())), "{message}");
        assert!(message.contains("`lockstep data fetch`, or `apt install dataset-fashion-mnist`"), "{message}");

        fs::write(changed.path().join("t10k-images-idx3-ubyte"), idx_file(8, &[1, 1], &[1])).unwrap();
        let error = read(&places).unwrap_err();
        assert!(matches!(&error, DataError::Checksum { name, .. } if name.ends_with("train-images-idx3-ubyte.gz")));
    }

    #[test]
    fn the_debian_package_is_read_where_it_is_installed() {
        let place = PathBuf::from(DEBIAN_DIRECTORY);
        if !place.is_dir() {
            eprintln!("skipped: there is no {DEBIAN_DIRECTORY}");
            return;
        }
        let split = read(&[place]).unwrap();
        assert_eq!((split.train.len(), split.validation.unwrap().len()), (60_000, 10_000));
    }
}
