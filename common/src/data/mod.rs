//! Data sets: reading them, holding them, and taking samples out of them.
//!
//! | content | recognised by | gives |
//! |---|---|---|
//! | IDX (the MNIST family) | `00 00 type rank` | samples of any shape, u8 or f32 |
//! | NPY (NumPy) | `\x93NUMPY` | (n, features), (n, h, w) or (n, h, w, c), u8 or f32; f64 is narrowed |
//! | NPZ (NumPy) | `PK` | the same, from one of the archive's arrays |
//!
//! IDX and NPY files may be gzipped. A file is recognised by its content, never by its name.
//!
//! Files are untrusted: what a header says is checked, and memory is taken only as the data arrive.

mod dataset;
mod error;
pub mod fashion_mnist;
pub mod idx;
mod input;
pub mod npy;
pub mod npz;
mod source;

use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::Path;

pub use dataset::{Dataset, Dtype, Elements, SampleView};
pub use error::{DataError, Fault};
pub use npy::write_npy_f32;
pub use source::{OpenOptions, Source, Split, open};

/// Reads the samples of an IDX, NPY or NPZ file, whichever it is.
///
/// # Errors
/// [`DataError`] with the path and what is wrong with the file.
pub fn read(path: &Path) -> Result<Dataset, DataError> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(|cause| DataError::Read { path: path.to_owned(), cause })?;
    let in_file = |cause| DataError::Content { name: name.clone(), fault: Fault::Io(cause) };

    let (start, rest) = input::with_start(&mut file, npz::MAGIC.len()).map_err(in_file)?;
    if start == npz::MAGIC {
        file.rewind().map_err(in_file)?;
        return npz::read(&name, BufReader::new(file));
    }
    let unpacked = input::unpacked(BufReader::new(rest)).map_err(in_file)?;
    let (start, content) = input::with_start(unpacked, npy::MAGIC.len()).map_err(in_file)?;
    match start.as_slice() {
        npy::MAGIC => npy::read(&name, content),
        [0, 0, _, _, ..] => idx::read(&name, content),
        _ => Err(DataError::Content { name, fault: Fault::UnknownFormat { start } }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Writes `bytes` to a file with a name that says nothing, and reads it.
    fn read_bytes(bytes: &[u8]) -> Result<Dataset, DataError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        read(file.path())
    }

    #[test]
    fn formats_are_recognised_by_content() {
        let idx = [0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, 10, 20];
        let npy = npy::tests::npy(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }", &[10, 20]);
        let npz = npz::tests::npz(&[("arr_0.npy", &npy)]);
        for bytes in [idx.to_vec(), npy.clone(), npz, input::tests::gzip(&idx), input::tests::gzip(&npy)] {
            let dataset = read_bytes(&bytes).unwrap();
            assert_eq!(dataset.sample(0), SampleView::U8(&[10, 20]));
        }
    }

    #[test]
    fn other_content_is_refused_with_its_first_bytes() {
        let check = |bytes: &[u8], expected: &str| {
            let message = read_bytes(bytes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(b"a,b\n1,2\n", "begins with 61 2c 62 0a 31 2c");
        check(b"", "is empty");
        check(b"P", "begins with 50");
        check(&[0x1f, 0x8b, 9], "cannot use");
        let message = read(Path::new("/nonexistent/x.npy")).unwrap_err().to_string();
        assert!(message.starts_with("cannot read /nonexistent/x.npy: "), "{message}");
    }
}
