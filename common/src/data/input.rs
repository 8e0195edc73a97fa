//! Reading bytes that nobody vouches for: unpacking, and elements whose number a header claims.

use std::io::{self, Chain, Cursor, Read};

use flate2::read::MultiGzDecoder;

use super::{Elements, Fault};
use crate::shape::Shape;

/// How a gzip file begins.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How much of a file is converted to floats at a time, in bytes. A multiple of every element size.
const CHUNK_BYTES: usize = 64 * 1024;

/// The element encodings that the file formats share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    U8,
    F32Le,
    F32Be,
    /// Narrowed to the nearest f32 while it is read.
    F64Le,
}

impl Encoding {
    const fn size_bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F32Le | Self::F32Be => 4,
            Self::F64Le => 8,
        }
    }
}

/// A reader whose first bytes were looked at: gives them again, then the rest.
pub(super) type WithStart<R> = Chain<Cursor<Vec<u8>>, R>;

/// The first `bytes` bytes of `reader` (fewer where it ends), and a reader of everything, those bytes included.
pub(super) fn with_start<R: Read>(mut reader: R, bytes: usize) -> io::Result<(Vec<u8>, WithStart<R>)> {
    let start = up_to(&mut reader, bytes)?;
    Ok((start.clone(), Cursor::new(start).chain(reader)))
}

/// The content of `reader`: unpacked if it is gzip, else as it is.
pub(super) fn unpacked<'r>(reader: impl Read + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let (start, reader) = with_start(reader, GZIP_MAGIC.len())?;
    Ok(if start == GZIP_MAGIC { Box::new(MultiGzDecoder::new(reader)) } else { Box::new(reader) })
}

/// Exactly `bytes` bytes of the header of a `format` file.
pub(super) fn header(reader: &mut dyn Read, format: &'static str, bytes: usize) -> Result<Vec<u8>, Fault> {
    let header = up_to(reader, bytes)?;
    if header.len() < bytes {
        return Err(Fault::HeaderTruncated { format, expected: bytes, found: header.len() });
    }
    Ok(header)
}

/// The elements of samples, to the end of `reader`; `axes`: (samples, ...sample shape). Returns the sample shape too.
///
/// Memory grows with what arrives: `axes` is only a claim.
pub(super) fn samples(reader: &mut dyn Read, axes: &[usize], encoding: Encoding) -> Result<(Shape, Elements), Fault> {
    let sample_shape = match axes {
        [samples] => return Err(Fault::Labels { samples: *samples }),
        [_, sample_axes @ ..] if !axes.contains(&0) => Shape::new(sample_axes),
        [] => return Err(Fault::Rank { axes: axes.to_vec() }),
        _ => return Err(Fault::ZeroAxis { axes: axes.to_vec() }),
    };
    Ok((sample_shape, elements(reader, axes, encoding)?))
}

/// The elements of an array of shape `axes`, to the end of `reader`.
pub(super) fn elements(reader: &mut dyn Read, axes: &[usize], encoding: Encoding) -> Result<Elements, Fault> {
    let too_large = || Fault::TooLarge { axes: axes.to_vec() };
    let expected = Shape::new(axes).checked_elements().ok_or_else(too_large)?;
    let expected_bytes = expected.checked_mul(encoding.size_bytes()).ok_or_else(too_large)?;
    let mut elements = match encoding {
        Encoding::U8 => Elements::U8(up_to(reader, expected)?),
        Encoding::F32Le => Elements::F32(floats(reader, expected, f32::from_le_bytes)?),
        Encoding::F32Be => Elements::F32(floats(reader, expected, f32::from_be_bytes)?),
        Encoding::F64Le => Elements::F32(floats(reader, expected, |bytes| f64::from_le_bytes(bytes) as f32)?),
    };
    if elements.len() < expected {
        return Err(Fault::Truncated { expected, found: elements.len() });
    }
    // Growing may have taken up to twice the memory, and a data set stays for the whole run.
    match &mut elements {
        Elements::U8(elements) => elements.shrink_to_fit(),
        Elements::F32(elements) => elements.shrink_to_fit(),
    }
    // Looking for one byte more also makes gzip and zip check their checksums, which stand at the end.
    if !up_to(reader, 1)?.is_empty() {
        return Err(Fault::TrailingBytes { expected, expected_bytes });
    }
    Ok(elements)
}

/// Up to `count` floats of `SIZE` bytes each; fewer when the reader ends.
fn floats<const SIZE: usize>(
    reader: &mut dyn Read,
    count: usize,
    decode: impl Fn([u8; SIZE]) -> f32,
) -> io::Result<Vec<f32>> {
    let mut floats = Vec::new();
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    while floats.len() < count {
        let wanted = (count - floats.len()).saturating_mul(SIZE).min(CHUNK_BYTES);
        chunk.clear();
        reader.take(wanted as u64).read_to_end(&mut chunk)?;
        floats.extend(chunk.as_chunks().0.iter().copied().map(&decode));
        if chunk.len() < wanted {
            break;
        }
    }
    Ok(floats)
}

/// Up to `bytes` bytes; fewer when the reader ends.
fn up_to(reader: &mut (impl Read + ?Sized), bytes: usize) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    reader.take(bytes as u64).read_to_end(&mut read)?;
    Ok(read)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    pub(in crate::data) fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn numbers_larger_than_a_chunk_are_read_whole() {
        let numbers: Vec<f32> = (0..3 * CHUNK_BYTES / 4 + 5).map(|number| number as f32).collect();
        let bytes = |encode: fn(f32) -> Vec<u8>| numbers.iter().copied().flat_map(encode).collect::<Vec<u8>>();
        let check = |encoding, bytes: Vec<u8>| {
            let read = elements(&mut bytes.as_slice(), &[numbers.len()], encoding).unwrap();
            assert_eq!(read, Elements::F32(numbers.clone()));
        };
        check(Encoding::F32Le, bytes(|number| number.to_le_bytes().to_vec()));
        check(Encoding::F32Be, bytes(|number| number.to_be_bytes().to_vec()));
        check(Encoding::F64Le, bytes(|number| f64::from(number).to_le_bytes().to_vec()));
    }

    #[test]
    fn a_damaged_gzip_file_is_noticed_at_its_end() {
        let mut packed = gzip(&[7; 100]);
        let crc = packed.len() - 8;
        packed[crc] ^= 1;
        let fault = elements(&mut unpacked(packed.as_slice()).unwrap(), &[100], Encoding::U8).unwrap_err();
        assert!(matches!(fault, Fault::Io(_)), "{fault}");
    }

    #[test]
    fn a_start_that_was_looked_at_is_read_again() {
        let (start, mut reader) = with_start(&b"abcdef"[..], 4).unwrap();
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        assert_eq!((start.as_slice(), all.as_str()), (&b"abcd"[..], "abcdef"));
    }
}
