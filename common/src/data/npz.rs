//! NPZ, NumPy's format for several arrays: a ZIP archive of NPY files.

use std::io::{Read, Seek};

use zip::ZipArchive;

use super::npy::Header;
use super::{DataError, Dataset, Elements, Fault};
use crate::shape::Shape;

/// How an NPZ file begins.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// The arrays that are taken for the samples when there are several, best first: Keras' and the usual names, and the one
/// that NumPy gives when none is given.
const SAMPLE_NAMES: [&str; 5] = ["x_train", "x", "images", "data", "arr_0"];

/// Reads the samples of an NPZ file: from its only array, labels (arrays of rank 1) and scalars aside, or else from the
/// first that is called `x_train`, `x`, `images`, `data` or `arr_0`. `name` is for messages.
///
/// # Errors
/// [`DataError::Content`] when the archive is damaged, has no array that is clearly meant, or when that array is not as
/// [`npy::read`](super::npy::read) takes it.
pub fn read(name: &str, reader: impl Read + Seek) -> Result<Dataset, DataError> {
    let parse = || {
        let mut archive = ZipArchive::new(reader)?;
        let arrays = arrays(&mut archive)?;
        let array = choose(&arrays)?;
        let (sample_shape, elements) = read_array(&mut archive, array)?;
        Ok((format!("{name}[{}]", array.name), sample_shape, elements))
    };
    let (array, sample_shape, elements) = parse().map_err(|fault: Fault| fault.of(name))?;
    Dataset::new(array, sample_shape, elements)
}

/// An array of an archive.
struct Array {
    /// Its place in the archive.
    index: usize,
    name: String,
    rank: usize,
}

/// The arrays of an archive. Whatever else is in it does not matter.
fn arrays(archive: &mut ZipArchive<impl Read + Seek>) -> Result<Vec<Array>, Fault> {
    let mut arrays = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let Some(name) = entry.name()?.strip_suffix(".npy").map(str::to_owned) else { continue };
        match Header::read(&mut entry) {
            Ok(header) => arrays.push(Array { index, name, rank: header.rank() }),
            Err(fault) => return Err(Fault::InArchive { array: name, fault: Box::new(fault) }),
        }
    }
    Ok(arrays)
}

/// The array that has the samples.
fn choose(arrays: &[Array]) -> Result<&Array, Fault> {
    let names = |arrays: &[&Array]| arrays.iter().map(|array| array.name.clone()).collect();
    let candidates: Vec<&Array> = arrays.iter().filter(|array| array.rank >= 2).collect();
    match candidates[..] {
        [] => Err(Fault::NoSamples { names: names(&arrays.iter().collect::<Vec<_>>()) }),
        [array] => Ok(array),
        _ => SAMPLE_NAMES
            .iter()
            .find_map(|name| candidates.iter().copied().find(|array| array.name == *name))
            .ok_or_else(|| Fault::Ambiguous { names: names(&candidates) }),
    }
}

/// The sample shape and the elements of an array.
fn read_array(archive: &mut ZipArchive<impl Read + Seek>, array: &Array) -> Result<(Shape, Elements), Fault> {
    let mut entry = archive.by_index(array.index)?;
    Header::read(&mut entry)
        .and_then(|header| header.read_samples(&mut entry))
        .map_err(|fault| Fault::InArchive { array: array.name.clone(), fault: Box::new(fault) })
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::{Cursor, Write};

    use proptest::prelude::*;
    use zip::write::SimpleFileOptions;
    use zip::{CompressionMethod, ZipWriter};

    use super::*;
    use crate::data::npy::tests::{array, npy};

    pub(in crate::data) fn npz(entries: &[(&str, &[u8])]) -> Vec<u8> {
        zip(entries, CompressionMethod::Deflated)
    }

    fn zip(entries: &[(&str, &[u8])], compression: CompressionMethod) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in entries {
            writer.start_file(*name, SimpleFileOptions::default().compression_method(compression)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn read_bytes(bytes: &[u8]) -> Result<Dataset, DataError> {
        read("d", Cursor::new(bytes))
    }

    /// An array of one sample with one element, by which it is recognised.
    fn samples(mark: u8) -> Vec<u8> {
        array("|u1", "(1, 1)", &[mark])
    }

    #[test]
    fn the_array_with_the_samples_is_chosen() {
        let labels = array("<i8", "(1,)", &[0; 8]);
        let scalar = array("<i8", "()", &[0; 8]);
        let check = |entries: &[(&str, &[u8])], expected: &str| {
            for compression in [CompressionMethod::Stored, CompressionMethod::Deflated] {
                let dataset = read_bytes(&zip(entries, compression)).unwrap();
                assert_eq!(dataset.name(), expected);
                assert_eq!(dataset.elements(), &Elements::U8(vec![1]));
            }
        };
        check(&[("anything.npy", &samples(1))], "d[anything]");
        check(&[("y.npy", &labels), ("anything.npy", &samples(1)), ("n.npy", &scalar)], "d[anything]");
        check(&[("notes.txt", b"hello"), ("anything.npy", &samples(1))], "d[anything]");
        check(&[("arr_0.npy", &samples(1)), ("arr_1.npy", &samples(2))], "d[arr_0]");
        check(&[("x_test.npy", &samples(2)), ("x.npy", &samples(3)), ("x_train.npy", &samples(1))], "d[x_train]");
        check(&[("other.npy", &samples(2)), ("images.npy", &samples(1))], "d[images]");
        check(&[("other.npy", &samples(2)), ("data.npy", &samples(1))], "d[data]");
    }

    #[test]
    fn unclear_and_damaged_archives_are_refused() {
        let check = |bytes: &[u8], expected: &str| {
            let message = read_bytes(bytes).unwrap_err().to_string();
            assert!(message.starts_with(&format!("cannot use d: {expected}")), "{message}");
        };
        let labels = array("|u1", "(1,)", &[0]);
        check(
            &npz(&[("a.npy", &samples(1)), ("b.npy", &samples(2)), ("y.npy", &labels)]),
            "any of its arrays a, b could be meant",
        );
        check(&npz(&[("y.npy", &labels)]), "none of its arrays (y) has samples in it");
        check(&npz(&[("notes.txt", b"hello")]), "none of its arrays () has samples in it");
        check(&npz(&[("x.npy", b"hello")]), "its array x: it ends after 5 of the 8 bytes of its NPY header");
        let fortran = npy(1, "{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1), }", &[0]);
        check(&npz(&[("x.npy", &fortran)]), "its array x: its elements are in Fortran order");
        check(&npz(&[("x.npy", &array("|u1", "(2, 2)", &[0; 3]))]), "its array x: its header promises 4 elements");
        check(b"PK\x03\x04", "it is not a readable NPZ archive: ");
        check(b"", "it is not a readable NPZ archive: ");

        let mut damaged = zip(&[("x.npy", &samples(1))], CompressionMethod::Stored);
        let at = damaged.windows(4).position(|window| window == b"}   ").unwrap();
        damaged[at + 1] = b'\n';
        check(&damaged, "its array x: it cannot be read to its end: Invalid checksum");
    }

    proptest! {
        /// No bytes make the reader panic, whether they are noise or an archive with noise in it.
        #[test]
        fn no_bytes_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..64),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let _ = read_bytes(&noise);
            let mut archive = npz(&[("x.npy", &samples(1)), ("y.npy", &noise)]);
            for (at, byte) in changes {
                let at = at.index(archive.len());
                archive[at] = byte;
            }
            let _ = read_bytes(&archive);
        }
    }
}
