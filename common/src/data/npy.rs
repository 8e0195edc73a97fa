//! NPY, NumPy's format for one array.
//!
//! `\x93NUMPY`, the version (two bytes), the header's length (little-endian, u16 in version 1, else u32), the header (a
//! Python dictionary with `descr`, `fortran_order` and `shape`), then the elements.

use std::io::{self, Read, Write};
use std::path::Path;

use super::input::{self, Encoding};
use super::{DataError, Dataset, Fault};
use crate::files;
use crate::shape::Shape;

const FORMAT: &str = "NPY";

/// How an NPY file begins.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// The longest header that is read. NumPy's own default is 10,000 (`max_header_size`); those of plain arrays have 118.
const MAX_HEADER_BYTES: usize = 64 * 1024;

/// The elements of a file that we write begin at a multiple of this, as NumPy's do.
const ALIGNMENT_BYTES: usize = 64;

/// Reads the samples of an NPY file, gzipped or not: u8, f32 or f64 (narrowed to f32), of shape (n, features),
/// (n, h, w) or (n, h, w, c), rows first. `name` is for messages.
///
/// # Errors
/// [`DataError::Content`] when the file is something else, damaged, or has another type, shape or order.
pub fn read(name: &str, reader: impl Read) -> Result<Dataset, DataError> {
    let parse = || {
        let mut reader = input::unpacked(reader)?;
        let header = Header::read(&mut reader)?;
        header.read_samples(&mut reader)
    };
    let (sample_shape, elements) = parse().map_err(|fault: Fault| fault.of(name))?;
    Dataset::new(name, sample_shape, elements)
}

/// Writes an array of floats as an NPY file (version 1.0). `axes`: all of them, the batch too. What was at `path` is
/// replaced when everything is written, and kept when that fails.
///
/// # Errors
/// [`DataError::Content`] when `elements` does not have the shape, [`DataError::Write`] when the file cannot be written.
pub fn write_npy_f32(path: &Path, axes: &[usize], elements: &[f32]) -> Result<(), DataError> {
    let expected = Shape::new(axes).checked_elements();
    if expected != Some(elements.len()) {
        let fault = Fault::ShapeMismatch {
            axes: axes.to_vec(),
            expected: expected.unwrap_or(usize::MAX),
            found: elements.len(),
        };
        return Err(fault.of(&path.display().to_string()));
    }
    files::replace(path, |file| {
        file.write_all(&header_of(axes)?)?;
        elements.iter().try_for_each(|element| file.write_all(&element.to_le_bytes()))
    })
    .map_err(|cause| DataError::Write { path: path.to_owned(), cause })
}

/// Everything that precedes the elements of an array of floats.
fn header_of(axes: &[usize]) -> io::Result<Vec<u8>> {
    // Python needs the comma after a lone axis, and does not mind it after others.
    let shape: String = axes.iter().map(|axis| format!("{axis}, ")).collect();
    let dictionary = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}), }}", shape.trim_end());
    let before_padding = MAGIC.len() + 4 + dictionary.len() + 1;
    let padding = before_padding.next_multiple_of(ALIGNMENT_BYTES) - before_padding;
    let length = u16::try_from(dictionary.len() + padding + 1).map_err(io::Error::other)?;

    let mut header = MAGIC.to_vec();
    header.extend([1, 0]);
    header.extend(length.to_le_bytes());
    writeln!(header, "{dictionary}{:padding$}", "")?;
    Ok(header)
}

/// What an NPY header says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    /// NumPy's name of the element type, as it stands there.
    descr: String,
    fortran_order: bool,
    /// All axes, the samples' first.
    axes: Vec<usize>,
}

impl Header {
    pub(super) fn read(reader: &mut dyn Read) -> Result<Self, Fault> {
        let start = input::header(reader, FORMAT, MAGIC.len() + 2)?;
        let (magic, version) = start.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(Fault::Magic { format: FORMAT, expected: "93 4e 55 4d 50 59", found: start });
        }
        let length_bytes = match *version {
            [1, 0] => 2,
            [2 | 3, 0] => 4,
            _ => return Err(Fault::NpyVersion { major: version[0], minor: version[1] }),
        };
        let length = input::header(reader, FORMAT, length_bytes)?;
        let length = length.iter().rev().fold(0, |length, &byte| length << 8 | usize::from(byte));
        if length > MAX_HEADER_BYTES {
            return Err(Fault::NpyHeader(format!("it claims {length} bytes; at most {MAX_HEADER_BYTES} are read")));
        }
        let dictionary = input::header(reader, FORMAT, length)?;
        let dictionary = str::from_utf8(&dictionary).map_err(|error| Fault::NpyHeader(error.to_string()))?;
        Self::parse(dictionary).map_err(Fault::NpyHeader)
    }

    /// Reads the rest of the file as samples.
    pub(super) fn read_samples(&self, reader: &mut dyn Read) -> Result<(Shape, super::Elements), Fault> {
        if !(1..=4).contains(&self.axes.len()) {
            return Err(Fault::Rank { axes: self.axes.clone() });
        }
        let encoding = match self.descr.as_str() {
            "|u1" => Encoding::U8,
            "<f4" => Encoding::F32Le,
            ">f4" => Encoding::F32Be,
            "<f8" => Encoding::F64Le,
            _ => return Err(Fault::NpyDtype(described(&self.descr))),
        };
        // A list reads the same either way, and is refused as what it is.
        if self.fortran_order && self.axes.len() > 1 {
            return Err(Fault::FortranOrder);
        }
        input::samples(reader, &self.axes, encoding)
    }

    /// The number of axes, the samples' included.
    pub(super) fn rank(&self) -> usize {
        self.axes.len()
    }

    fn parse(dictionary: &str) -> Result<Self, String> {
        let mut text = Text(dictionary);
        let (mut descr, mut fortran_order, mut axes) = (None, None, None);
        text.expect('{')?;
        while !text.skip('}') {
            let key = text.quoted()?;
            text.expect(':')?;
            match key {
                "descr" => descr = Some(text.descr()?),
                "fortran_order" => fortran_order = Some(text.truth()?),
                "shape" => axes = Some(text.tuple()?),
                _ => return Err(format!("unknown key '{key}'")),
            }
            if !text.skip(',') {
                text.expect('}')?;
                break;
            }
        }
        text.end()?;
        let missing = |key: &str| format!("'{key}' is missing");
        Ok(Self {
            descr: descr.ok_or_else(|| missing("descr"))?,
            fortran_order: fortran_order.ok_or_else(|| missing("fortran_order"))?,
            axes: axes.ok_or_else(|| missing("shape"))?,
        })
    }
}

/// An element type with its name in words, where people will not know the code.
fn described(descr: &str) -> String {
    let meaning = match descr.trim_start_matches(['<', '>', '|', '=']) {
        "f2" => "float16",
        "f8" => "big-endian float64",
        "i1" => "int8",
        "i2" => "int16",
        "i4" => "int32",
        "i8" => "int64",
        "u2" => "uint16",
        "u4" => "uint32",
        "u8" => "uint64",
        "b1" => "bool",
        "O" => "Python objects",
        _ => return format!("'{descr}'"),
    };
    format!("'{descr}' ({meaning})")
}

/// The rest of a header's text: as much of Python's literals as NumPy writes. A step that fails says what it met.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    fn skip(&mut self, character: char) -> bool {
        self.0 = self.0.trim_start();
        let rest = self.0.strip_prefix(character);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn expect(&mut self, character: char) -> Result<(), String> {
        if self.skip(character) { Ok(()) } else { Err(self.unexpected(&format!("'{character}'"))) }
    }

    fn quoted(&mut self) -> Result<&'a str, String> {
        let quote = if self.skip('"') { '"' } else { '\'' };
        if quote == '\'' {
            self.expect(quote)?;
        }
        let (quoted, rest) = self.0.split_once(quote).ok_or_else(|| self.unexpected("the end of a string"))?;
        self.0 = rest;
        Ok(quoted)
    }

    /// An element type: a string, or the list of fields that a structured type has, which is taken as it stands.
    fn descr(&mut self) -> Result<String, String> {
        if !self.skip('[') {
            return self.quoted().map(str::to_owned);
        }
        let end = self.0.rfind(']').ok_or_else(|| self.unexpected("']'"))?;
        let (fields, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(format!("[{fields}]"))
    }

    fn truth(&mut self) -> Result<bool, String> {
        self.0 = self.0.trim_start();
        for (word, value) in [("True", true), ("False", false)] {
            if let Some(rest) = self.0.strip_prefix(word) {
                self.0 = rest;
                return Ok(value);
            }
        }
        Err(self.unexpected("True or False"))
    }

    fn tuple(&mut self) -> Result<Vec<usize>, String> {
        let mut numbers = Vec::new();
        self.expect('(')?;
        while !self.skip(')') {
            numbers.push(self.number()?);
            if !self.skip(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(numbers)
    }

    fn number(&mut self) -> Result<usize, String> {
        self.0 = self.0.trim_start();
        let end = self.0.find(|character: char| !character.is_ascii_digit()).unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(end);
        let number = digits.parse().map_err(|_| self.unexpected("an axis"))?;
        self.0 = rest;
        Ok(number)
    }

    fn end(&self) -> Result<(), String> {
        if self.0.trim().is_empty() { Ok(()) } else { Err(self.unexpected("nothing more")) }
    }

    fn unexpected(&self, expected: &str) -> String {
        /// Enough to find the place; the whole rest may be long.
        const SHOWN_CHARACTERS: usize = 20;
        let met: String = self.0.trim_end().chars().take(SHOWN_CHARACTERS).collect();
        let met = if met.is_empty() { "its end".to_owned() } else { format!("{met:?}") };
        format!("expected {expected}, met {met}")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::data::input::tests::gzip;
    use crate::data::{Dtype, Elements};

    /// A file with the given version and header, whatever they say.
    pub(in crate::data) fn npy(major: u8, header: &str, elements: &[u8]) -> Vec<u8> {
        let length = (header.len() as u32).to_le_bytes();
        let length = if major == 1 { &length[..2] } else { &length[..] };
        [MAGIC, &[major, 0], length, header.as_bytes(), elements].concat()
    }

    /// A file as NumPy writes it.
    pub(in crate::data) fn array(descr: &str, shape: &str, elements: &[u8]) -> Vec<u8> {
        npy(1, &format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}    \n"), elements)
    }

    #[test]
    fn every_version_type_and_shape_is_read() {
        let check = |bytes: Vec<u8>, sample_shape: &[usize], elements: Elements| {
            for bytes in [gzip(&bytes), bytes] {
                let dataset = read("d", bytes.as_slice()).unwrap();
                assert_eq!((dataset.sample_shape(), dataset.elements()), (&Shape::new(sample_shape), &elements));
            }
        };
        let floats = Elements::F32(vec![1.5, -0.25]);
        check(array("|u1", "(3, 1)", &[1, 2, 255]), &[1], Elements::U8(vec![1, 2, 255]));
        check(array("<f4", "(1, 2)", &[1.5f32, -0.25].map(f32::to_le_bytes).concat()), &[2], floats.clone());
        check(array(">f4", "(1, 1, 2)", &[1.5f32, -0.25].map(f32::to_be_bytes).concat()), &[1, 2], floats.clone());
        check(array("<f8", "(1, 2, 1, 1)", &[1.5f64, -0.25].map(f64::to_le_bytes).concat()), &[2, 1, 1], floats);
        for (version, header) in [
            (1, "{\"shape\":(1,2),\"fortran_order\":False,\"descr\":\"|u1\"}"),
            (2, "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }\n"),
            (3, " { 'descr' : '|u1' , 'fortran_order' : False , 'shape' : ( 1 , 2 , ) }"),
        ] {
            check(npy(version, header, &[8, 9]), &[2], Elements::U8(vec![8, 9]));
        }
    }

    #[test]
    fn other_arrays_are_refused_with_what_to_do() {
        let check = |bytes: &[u8], expected: &str| {
            let message = read("d", bytes).unwrap_err().to_string();
            assert!(message.starts_with(&format!("cannot use d: {expected}")), "{message}");
        };
        check(&array("<i8", "(1, 2)", &[0; 16]), "its elements are '<i8' (int64); supported are '|u1' (uint8)");
        check(&array("<f2", "(1, 2)", &[0; 4]), "its elements are '<f2' (float16)");
        check(&array("<U7", "(1, 2)", &[0; 56]), "its elements are '<U7'; supported");
        check(
            &npy(1, "{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1, 1)}", &[0; 4]),
            "its elements are '[('x', '<f4')]'; supported",
        );
        check(
            &npy(1, "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2), }", &[0; 4]),
            "its elements are in Fortran order; save it with np.save(file, np.ascontiguousarray(array))",
        );
        check(&array("|u1", "(3,)", &[0; 3]), "its shape is (3,): one number per sample, as labels are");
        check(&array("|u1", "()", &[0]), "its shape is (); samples have shape (n, features)");
        check(&array("|u1", "(1, 1, 1, 1, 1)", &[0]), "its shape is (1, 1, 1, 1, 1); samples have");
        check(&array("|u1", "(0, 4)", &[]), "its shape is (0, 4): nothing is in it");
        check(&array("<f4", "(9223372036854775807, 2)", &[]), "its shape is (9223372036854775807, 2): more elements");
        check(&array("<f4", "(4294967296, 4294967296)", &[]), "its shape is (4294967296, 4294967296): more elements");
        check(&array("|u1", "(2, 2)", &[0; 3]), "its header promises 4 elements, but only 3 follow");
        check(&array("<f8", "(2, 2)", &[0; 31]), "its header promises 4 elements, but only 3 follow");
        check(&array("<f4", "(2, 2)", &[0; 17]), "its header promises 4 elements (16 bytes), but more bytes follow");
        check(&array("<f8", "(1, 1)", &1e300f64.to_le_bytes()), "element 0 of sample 0 is inf as a 32-bit float");
    }

    #[test]
    fn damaged_headers_are_refused() {
        let check = |bytes: &[u8], expected: &str| {
            let message = read("d", bytes).unwrap_err().to_string();
            assert!(message.starts_with(&format!("cannot use d: {expected}")), "{message}");
        };
        let malformed = |header: &str, expected: &str| {
            check(&npy(2, header, &[0; 4]), &format!("its NPY header is malformed: {expected}"));
        };
        check(b"\x93NUM", "it ends after 4 of the 8 bytes of its NPY header");
        check(b"\x93NUMPY\x01\x00\x76\x00{", "it ends after 1 of the 118 bytes of its NPY header");
        check(b"\x00NUMPY\x01\x00", "it begins with 00 4e 55 4d 50 59 01 00, not with the 93 4e 55 4d 50 59 of NPY");
        check(&npy(4, "{}", &[]), "its NPY version is 4.0; supported are 1.0, 2.0 and 3.0");
        check(
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
            "its NPY header is malformed: it claims 4294967295 bytes; at most 65536 are read",
        );
        check(b"\x93NUMPY\x01\x00\x02\x00\xff\xff", "its NPY header is malformed: invalid utf-8");
        malformed("", "expected '{', met its end");
        malformed("{}", "'descr' is missing");
        malformed("{'descr': '|u1'}", "'fortran_order' is missing");
        malformed("{'descr': '|u1', 'fortran_order': False}", "'shape' is missing");
        malformed("{'descr': '|u1', 'fortran_order': no}", "expected True or False, met \"no}\"");
        malformed("{'descr: 1", "expected the end of a string, met \"descr: 1\"");
        malformed("{'descr': ['x'", "expected ']', met \"'x'\"");
        malformed("{'shape': (1, -2)}", "expected an axis, met \"-2)}\"");
        malformed("{'shape': (99999999999999999999,)}", "expected an axis, met \"99999999999999999999\"");
        malformed("{'shape': (1 2)}", "expected ')', met \"2)}\"");
        malformed("{'size': 1}", "unknown key 'size'");
        malformed("{'shape': (1,)} import", "expected nothing more, met \" import\"");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("array.npy");
        for axes in [vec![2, 3], vec![1, 2, 3], vec![3, 1, 2, 1]] {
            let elements: Vec<f32> = (0..6).map(|number| number as f32 - 0.1).collect();
            write_npy_f32(&path, &axes, &elements).unwrap();
            let dataset = super::super::read(&path).unwrap();
            assert_eq!(dataset.dtype(), Dtype::F32);
            assert_eq!(dataset.sample_shape().axes(), &axes[1..]);
            assert_eq!(dataset.elements(), &Elements::F32(elements));
        }
    }

    #[test]
    fn the_bytes_written_are_those_of_numpy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("list.npy");
        write_npy_f32(&path, &[1], &[1.0]).unwrap();
        // np.save('list.npy', np.array([1], '<f4'))
        let header = format!("{:117}\n", "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }");
        let expected = [b"\x93NUMPY\x01\x00\x76\x00", header.as_bytes(), &[0, 0, 0x80, 0x3f]];
        assert_eq!(fs::read(&path).unwrap(), expected.concat());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("array.npy");
        let message = write_npy_f32(&path, &[2, 2], &[0.0; 3]).unwrap_err().to_string();
        assert!(message.ends_with("the shape (2, 2) has 4 elements, but 3 are given"), "{message}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let message = write_npy_f32(&path.join("below"), &[1], &[0.0]).unwrap_err().to_string();
        assert!(message.starts_with("cannot write "), "{message}");
    }

    proptest! {
        /// No bytes make the reader panic, whether they are noise, a header with noise in it, or noise as a header.
        #[test]
        fn no_bytes_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..64),
            text in "[ {}()\\[\\]'\":,0-9a-zé]{0,60}",
            shape in "\\(([0-9]{1,20}, ?){0,5}\\)",
            major in 0u8..5,
        ) {
            let _ = read("noise", noise.as_slice());
            let _ = read("noise", npy(major, &text, &noise).as_slice());
            let _ = read("noise", [MAGIC, &[major, 0], noise.as_slice()].concat().as_slice());
            let _ = read("noise", array("<f4", &shape, &noise).as_slice());
        }
    }
}
