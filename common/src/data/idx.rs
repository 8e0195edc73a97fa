//! IDX, the format of MNIST and its relatives.
//!
//! `00 00 type rank`, then `rank` axes as big-endian u32, outermost first, then the elements, big-endian.

use std::io::Read;

use super::input::{self, Encoding};
use super::{DataError, Dataset, Elements, Fault};

const FORMAT: &str = "IDX";

/// Reads the samples of an IDX file, gzipped or not: unsigned bytes or 32-bit floats, with a rank of at least 2.
/// `name` is for messages.
///
/// # Errors
/// [`DataError::Content`] when the file is something else, damaged, or holds labels.
pub fn read(name: &str, reader: impl Read) -> Result<Dataset, DataError> {
    let parse = || {
        let mut reader = input::unpacked(reader)?;
        let (axes, encoding) = read_header(&mut reader)?;
        input::samples(&mut reader, &axes, encoding)
    };
    let (sample_shape, elements) = parse().map_err(|fault: Fault| fault.of(name))?;
    Dataset::new(name, sample_shape, elements)
}

/// Reads the labels of an IDX file, gzipped or not: unsigned bytes with a rank of 1. `name` is for messages.
///
/// # Errors
/// [`DataError::Content`] when the file is something else, or damaged.
pub fn read_labels(name: &str, reader: impl Read) -> Result<Vec<u8>, DataError> {
    let parse = || {
        let mut reader = input::unpacked(reader)?;
        match read_header(&mut reader)? {
            (axes, Encoding::U8) if axes.len() == 1 => match input::elements(&mut reader, &axes, Encoding::U8)? {
                Elements::U8(labels) => Ok(labels),
                Elements::F32(_) => Err(Fault::NotLabels { axes }),
            },
            (axes, _) => Err(Fault::NotLabels { axes }),
        }
    };
    parse().map_err(|fault| fault.of(name))
}

/// The axes, outermost first, and the encoding of the elements.
fn read_header(reader: &mut dyn Read) -> Result<(Vec<usize>, Encoding), Fault> {
    let start = input::header(reader, FORMAT, 4)?;
    let &[0, 0, code, rank] = start.as_slice() else {
        return Err(Fault::Magic { format: FORMAT, expected: "00 00", found: start });
    };
    let encoding = match code {
        0x08 => Encoding::U8,
        0x0d => Encoding::F32Be,
        _ => return Err(Fault::IdxType { code, meaning: type_name(code) }),
    };
    let axes = input::header(reader, FORMAT, 4 * usize::from(rank)).map_err(|fault| match fault {
        // Of the whole header, not of its second part.
        Fault::HeaderTruncated { format, expected, found } => {
            Fault::HeaderTruncated { format, expected: start.len() + expected, found: start.len() + found }
        }
        other => other,
    })?;
    Ok((axes.as_chunks().0.iter().map(|&axis| u32::from_be_bytes(axis) as usize).collect(), encoding))
}

/// What the format says about a type that is not supported here.
fn type_name(code: u8) -> &'static str {
    match code {
        0x09 => "signed bytes",
        0x0b => "16-bit integers",
        0x0c => "32-bit integers",
        0x0e => "64-bit floats",
        _ => "not in the format",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::{Dtype, SampleView};
    use crate::shape::Shape;

    pub(in crate::data) fn idx(code: u8, axes: &[u32], elements: &[u8]) -> Vec<u8> {
        let axes_bytes: Vec<u8> = axes.iter().flat_map(|axis| axis.to_be_bytes()).collect();
        [&[0, 0, code, axes.len() as u8], axes_bytes.as_slice(), elements].concat()
    }

    #[test]
    fn samples_of_any_rank_are_read() {
        let check = |axes: &[u32], sample_shape: &[usize]| {
            let bytes: Vec<u8> = (0..24).collect();
            let dataset = read("d", idx(8, axes, &bytes).as_slice()).unwrap();
            assert_eq!(dataset.sample_shape(), &Shape::new(sample_shape));
            assert_eq!(dataset.elements(), &Elements::U8(bytes));
        };
        check(&[2, 12], &[12]);
        check(&[2, 3, 4], &[3, 4]);
        check(&[1, 2, 4, 3], &[2, 4, 3]);
        check(&[24, 1, 1, 1, 1], &[1, 1, 1, 1]);

        let floats = [1.5f32, -2.0].map(f32::to_be_bytes).concat();
        let dataset = read("d", idx(0x0d, &[1, 2], &floats).as_slice()).unwrap();
        assert_eq!((dataset.dtype(), dataset.sample(0)), (Dtype::F32, SampleView::F32(&[1.5, -2.0])));
    }

    #[test]
    fn damaged_and_foreign_files_are_refused() {
        let check = |bytes: &[u8], expected: &str| {
            let message = read("d", bytes).unwrap_err().to_string();
            assert!(message.starts_with(&format!("cannot use d: {expected}")), "{message}");
        };
        check(b"", "it ends after 0 of the 4 bytes of its IDX header");
        check(&[0, 0, 8, 3, 0, 0], "it ends after 6 of the 16 bytes of its IDX header");
        check(b"\x93NUMPY", "it begins with 93 4e 55 4d, not with the 00 00 of IDX");
        check(&idx(0x0b, &[1, 2], &[0; 4]), "its IDX element type is 0x0b (16-bit integers); supported are 0x08");
        check(&idx(0x77, &[1, 2], &[0; 4]), "its IDX element type is 0x77 (not in the format)");
        check(&idx(8, &[5], &[0; 5]), "its shape is (5,): one number per sample, as labels are");
        check(&idx(8, &[], &[0]), "its shape is ()");
        check(&idx(8, &[0, 2], &[]), "its shape is (0, 2): nothing is in it");
        check(&idx(8, &[2, 0, 2], &[]), "its shape is (2, 0, 2): nothing is in it");
        check(&idx(8, &[2, 3], &[0; 5]), "its header promises 6 elements, but only 5 follow");
        check(&idx(0x0d, &[2, 3], &[0; 23]), "its header promises 6 elements, but only 5 follow");
        check(&idx(8, &[2, 3], &[0; 7]), "its header promises 6 elements (6 bytes), but more bytes follow");
        check(
            &idx(8, &[u32::MAX, u32::MAX, u32::MAX], &[0; 7]),
            "its shape is (4294967295, 4294967295, 4294967295): more",
        );
        check(
            &idx(8, &[u32::MAX, u32::MAX - 1], &[0; 7]),
            "its header promises 18446744060824649730 elements, but only 7",
        );
        check(&idx(0x0d, &[1, 1], &f32::NAN.to_be_bytes()), "element 0 of sample 0 is NaN");
    }

    #[test]
    fn labels_are_read_as_labels_only() {
        assert_eq!(read_labels("d", idx(8, &[3], &[7, 8, 9]).as_slice()).unwrap(), [7, 8, 9]);
        let check = |bytes: Vec<u8>, expected: &str| {
            let message = read_labels("d", bytes.as_slice()).unwrap_err().to_string();
            assert!(message.starts_with(&format!("cannot use d: {expected}")), "{message}");
        };
        check(idx(8, &[1, 3], &[7, 8, 9]), "its shape is (1, 3); labels are unsigned bytes of shape (n,)");
        check(idx(0x0d, &[1], &[0; 4]), "its shape is (1,); labels are unsigned bytes of shape (n,)");
        check(idx(8, &[3], &[7, 8]), "its header promises 3 elements, but only 2 follow");
    }

    proptest! {
        /// No bytes make the reader panic, whether they are noise or a file with noise in it.
        #[test]
        fn no_bytes_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..64),
            axes in proptest::collection::vec(prop_oneof![0u32..4, any::<u32>()], 0..5),
            code in prop_oneof![Just(8u8), Just(0x0d), any::<u8>()],
        ) {
            let _ = read("noise", noise.as_slice());
            let _ = read("noise", idx(code, &axes, &noise).as_slice());
            let _ = read("noise", [&[0x1f, 0x8b, 8, 0], noise.as_slice()].concat().as_slice());
            let _ = read_labels("noise", idx(code, &axes, &noise).as_slice());
        }
    }
}
