//! Floats as bytes: little-endian, checked, and copied at most once each way.

use std::hash::Hasher as _;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use lockstep_common::kernel::{Isa, Precision, bf16};
use lockstep_common::protocol::{CHUNK_FLOATS, Samples};
use lockstep_common::shared_memory::FloatBuffer;
use twox_hash::xxhash3_64::{Hasher, RawHasher, SecretBuffer};

use crate::limits::CHUNK_BYTES;
use crate::wire_error::Fault;

/// The checksum of a message's data.
pub fn checksum(data: &[u8]) -> u64 {
    Hasher::oneshot(data)
}

/// The checksum of a piece of samples: the ids, little-endian, then the data.
pub fn samples_checksum(ids: &[u32], data: &[u8]) -> u64 {
    let mut hasher = RawHasher::new(SecretBuffer::default());
    if cfg!(target_endian = "little") {
        hasher.write(bytemuck::cast_slice(ids));
    } else {
        ids.iter().for_each(|id| hasher.write(&id.to_le_bytes()));
    }
    hasher.write(data);
    hasher.finish()
}

/// Floats as bytes: one copy.
pub fn to_bytes(values: &[f32]) -> Bytes {
    if cfg!(target_endian = "little") {
        Bytes::copy_from_slice(bytemuck::cast_slice(values))
    } else {
        values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }
}

/// Floats as bytes, rounded to bfloat16 numbers: two for each, its upper half.
pub fn to_halves(values: &[f32]) -> Bytes {
    let mut halves = vec![0; values.len()];
    bf16::round_to_halves(Isa::best(), values, &mut halves);
    if cfg!(target_endian = "big") {
        halves.iter_mut().for_each(|half| *half = half.to_le());
    }
    Bytes::from_owner(Halves(halves))
}

/// A range of shared floats as bytes: no copy on a little-endian machine. `None` if `range` is not a range of `values`.
pub fn shared_to_bytes(values: &Arc<FloatBuffer>, range: Range<usize>) -> Option<Bytes> {
    let floats = values.get(range.clone())?;
    if !cfg!(target_endian = "little") {
        return Some(to_bytes(floats));
    }
    let whole = Bytes::from_owner(Floats(Arc::clone(values)));
    Some(whole.slice(range.start * size_of::<f32>()..range.end * size_of::<f32>()))
}

/// The elements of shared samples as they travel: no copy.
pub(crate) fn from_samples(samples: &Arc<Samples>) -> Bytes {
    Bytes::from_owner(Elements(Arc::clone(samples)))
}

/// Bytes that hold numbers in a precision, as floats: one copy.
///
/// # Errors
/// [`Fault`] when `data` is longer than a chunk or no whole number of numbers.
pub fn to_floats(data: &[u8], precision: Precision) -> Result<Vec<f32>, Fault> {
    let mut values = vec![0.0; number_count(data, precision)?];
    copy(data, precision, &mut values);
    Ok(values)
}

/// Copies bytes that hold numbers in a precision over floats, for receivers who know where the chunk belongs.
///
/// # Errors
/// [`Fault`] when `data` is longer than a chunk, no whole number of numbers, or another number than `values` has.
pub fn copy_into(data: &[u8], precision: Precision, values: &mut [f32]) -> Result<(), Fault> {
    let numbers = number_count(data, precision)?;
    if numbers != values.len() {
        return Err(Fault::Count { things: "floats", expected: values.len() as u64, got: numbers as u64 });
    }
    copy(data, precision, values);
    Ok(())
}

/// How many numbers a chunk's data holds.
pub(crate) fn number_count(data: &[u8], precision: Precision) -> Result<usize, Fault> {
    let bytes = bytes_of(precision);
    at_most(data, CHUNK_FLOATS * bytes)?;
    match data.len() % bytes {
        0 => Ok(data.len() / bytes),
        _ => Err(Fault::Ragged { bytes: data.len(), multiple: bytes }),
    }
}

/// Bytes of a number that travels.
fn bytes_of(precision: Precision) -> usize {
    match precision {
        Precision::F32 => size_of::<f32>(),
        Precision::Bf16 => size_of::<u16>(),
    }
}

pub(crate) fn at_most_a_chunk(data: &[u8]) -> Result<(), Fault> {
    at_most(data, CHUNK_BYTES)
}

fn at_most(data: &[u8], limit: usize) -> Result<(), Fault> {
    if data.len() > limit {
        return Err(Fault::TooLarge { value: data.len() as u64, limit: limit as u64, unit: " bytes" });
    }
    Ok(())
}

pub(crate) fn verify(stated: u64, computed: u64) -> Result<(), Fault> {
    if stated == computed { Ok(()) } else { Err(Fault::Checksum { stated, computed }) }
}

/// `data` holds as many numbers as `values`.
fn copy(data: &[u8], precision: Precision, values: &mut [f32]) {
    match precision {
        Precision::F32 if cfg!(target_endian = "little") => bytemuck::cast_slice_mut(values).copy_from_slice(data),
        Precision::F32 => {
            for (value, bytes) in values.iter_mut().zip(data.as_chunks().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
        Precision::Bf16 => {
            for (value, half) in values.iter_mut().zip(data.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16);
            }
        }
    }
}

struct Floats(Arc<FloatBuffer>);

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

struct Halves(Vec<u16>);

impl AsRef<[u8]> for Halves {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

struct Elements(Arc<Samples>);

impl AsRef<[u8]> for Elements {
    fn as_ref(&self) -> &[u8] {
        &self.0.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_keep_their_bits_and_are_little_endian() {
        let values = vec![1.0f32, -0.0, f32::from_bits(0x7fc0_1234), f32::MIN_POSITIVE / 2.0];
        let bytes = to_bytes(&values);
        assert_eq!(&bytes[..4], [0, 0, 0x80, 0x3f]);
        let bits = |floats: &[f32]| floats.iter().map(|f| f.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&to_floats(&bytes, Precision::F32).unwrap()), bits(&values));
        // An odd start address, as inside a received message.
        let mut shifted = vec![0u8];
        shifted.extend_from_slice(&bytes);
        assert_eq!(bits(&to_floats(&shifted[1..], Precision::F32).unwrap()), bits(&values));
        let shared = Arc::new(values.into());
        assert_eq!(shared_to_bytes(&shared, 1..3).unwrap(), bytes.slice(4..12));
        assert!(shared_to_bytes(&shared, 1..5).is_none());
    }

    #[test]
    fn bfloat16_numbers_keep_their_bits_in_half_the_bytes() {
        let values = [1.0, -2.5, 0.0, f32::INFINITY, f32::from_bits(0x7fc1_0000), 1.0 + 1.0 / 512.0];
        let bytes = to_halves(&values);
        assert_eq!(&bytes[..4], [0x80, 0x3f, 0x20, 0xc0]);
        let bits = |floats: &[f32]| floats.iter().map(|f| f.to_bits()).collect::<Vec<u32>>();
        let rounded = values.map(bf16::round);
        assert_eq!((bits(&values[..5]), 1.0), (bits(&rounded[..5]), rounded[5]));
        assert_eq!(bits(&to_floats(&bytes, Precision::Bf16).unwrap()), bits(&rounded));
        let mut six = [7.0; 6];
        copy_into(&bytes, Precision::Bf16, &mut six).unwrap();
        assert_eq!(bits(&six), bits(&rounded));
        assert_eq!(to_floats(&[0; 3], Precision::Bf16).unwrap_err(), Fault::Ragged { bytes: 3, multiple: 2 });
        let long = to_floats(&vec![0; CHUNK_BYTES / 2 + 2], Precision::Bf16);
        assert!(matches!(long.unwrap_err(), Fault::TooLarge { value: 524_290, limit: 524_288, .. }));
    }

    #[test]
    fn lengths_are_checked_before_memory_is_taken() {
        assert_eq!(to_floats(&[0; 7], Precision::F32).unwrap_err(), Fault::Ragged { bytes: 7, multiple: 4 });
        let long = vec![0; CHUNK_BYTES + 4];
        assert!(matches!(
            to_floats(&long, Precision::F32).unwrap_err(),
            Fault::TooLarge { value: 1_048_580, limit: 1_048_576, .. }
        ));
        assert!(to_floats(&[], Precision::F32).unwrap().is_empty());
        let mut two = [0.0; 2];
        assert_eq!(
            copy_into(&[0; 4], Precision::F32, &mut two).unwrap_err(),
            Fault::Count { things: "floats", expected: 2, got: 1 }
        );
        copy_into(&[0, 0, 128, 63, 0, 0, 0, 64], Precision::F32, &mut two).unwrap();
        assert_eq!(two, [1.0, 2.0]);
    }
}
