//! Samples in pieces: the cutter for senders, the gatherer for receivers.

use std::sync::Arc;

use bytes::Bytes;
use lockstep_common::protocol::Samples;

use super::{At, at_most};
use crate::chunk::{at_most_a_chunk, from_samples, samples_checksum, verify};
use crate::v1;
use crate::wire_error::{Fault, WireError};

/// What an id costs at most in a message: a varint of 32 bits.
pub(super) const ID_BYTES: usize = 5;

/// Cuts samples into pieces. Ids and data are cut independently, ids first, so that any sample size works.
pub(super) struct Cutter {
    samples: Arc<Samples>,
    /// What is left of the samples' data; shares their memory.
    data: Bytes,
    /// How many ids are sent.
    ids: usize,
}

impl Cutter {
    pub(super) fn new(samples: Arc<Samples>) -> Self {
        Self { data: from_samples(&samples), samples, ids: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.data.is_empty() && self.ids == self.samples.ids.len()
    }

    /// The next piece, of at most `budget` bytes, which are taken off `budget`.
    pub(super) fn cut(&mut self, budget: &mut usize) -> v1::SamplePiece {
        let left = &self.samples.ids[self.ids..];
        let ids = left[..left.len().min(*budget / ID_BYTES)].to_vec();
        self.ids += ids.len();
        *budget -= ids.len() * ID_BYTES;
        let data = self.data.split_to(self.data.len().min(*budget));
        *budget -= data.len();
        v1::SamplePiece { checksum: samples_checksum(&ids, &data), ids, data }
    }
}

/// The most that pieces may add up to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Number of samples.
    pub(super) samples: u64,
    /// Bytes of one sample.
    pub(super) sample_bytes: u64,
    /// Number of samples in the part of the data; ids are below it.
    pub(super) ids: u64,
}

/// Bytes for which memory is taken before they arrive, if that many are announced.
const AHEAD_BYTES: usize = 16 << 20;

/// Puts pieces together again. Beyond [`AHEAD_BYTES`], memory is taken as data arrives, not for what is merely announced.
#[derive(Debug)]
pub(super) struct Gatherer {
    samples: Samples,
}

impl Gatherer {
    pub(super) fn new() -> Self {
        Self { samples: Samples { ids: Vec::new(), data: Vec::new() } }
    }

    pub(super) fn len(&self) -> u64 {
        self.samples.ids.len() as u64
    }

    pub(super) fn add(&mut self, piece: &v1::SamplePiece, bounds: Bounds) -> Result<(), WireError> {
        const M: &str = "SamplePiece";
        at_most_a_chunk(&piece.data).at(M, "data")?;
        verify(piece.checksum, samples_checksum(&piece.ids, &piece.data)).at(M, "checksum")?;
        at_most(self.len() + piece.ids.len() as u64, bounds.samples, " samples").at(M, "ids")?;
        let bytes = self.samples.data.len() as u64 + piece.data.len() as u64;
        at_most(bytes, bounds.samples * bounds.sample_bytes, " bytes of samples").at(M, "data")?;
        if let Some((i, &id)) = piece.ids.iter().enumerate().find(|(_, id)| u64::from(**id) >= bounds.ids) {
            let fault = Fault::TooLarge { value: id.into(), limit: bounds.ids.saturating_sub(1), unit: "" };
            return Err(WireError::new(M, format!("ids[{i}]"), fault));
        }
        reserve(&mut self.samples.ids, piece.ids.len(), bounds.samples);
        self.samples.ids.extend_from_slice(&piece.ids);
        reserve(&mut self.samples.data, piece.data.len(), bounds.samples * bounds.sample_bytes);
        self.samples.data.extend_from_slice(&piece.data);
        Ok(())
    }

    /// The samples, once the last piece is there.
    pub(super) fn finish(self, bounds: Bounds) -> Result<Samples, WireError> {
        let expected = self.len() * bounds.sample_bytes;
        let got = self.samples.data.len() as u64;
        if got != expected {
            return Err(WireError::new("SamplePiece", "data", Fault::Count { things: "bytes", expected, got }));
        }
        Ok(self.samples)
    }
}

/// Makes room for `more` elements. Nothing is moved on the way to `all` elements, and nothing is left over, if those are few;
/// else room doubles, up to `all`.
fn reserve<T>(elements: &mut Vec<T>, more: usize, all: u64) {
    if more <= elements.capacity() - elements.len() {
        return;
    }
    let room = (AHEAD_BYTES / size_of::<T>()).max(2 * elements.len());
    let room = room.min(usize::try_from(all).unwrap_or(usize::MAX)).max(elements.len() + more);
    elements.reserve_exact(room - elements.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: pieces of 1 MiB, of few or many bytes in all. Property: room is made once for few; else it never exceeds
    /// what is announced, or twice what came.
    #[test]
    fn room_is_made_for_what_is_announced_if_that_is_little() {
        const PIECE: usize = 1 << 20;
        for pieces in [1, 3, 40] {
            let mut elements: Vec<u8> = Vec::new();
            let mut sizes = vec![0];
            for _ in 0..pieces {
                reserve(&mut elements, PIECE, (pieces * PIECE) as u64);
                elements.resize(elements.len() + PIECE, 0);
                assert!(elements.capacity() <= AHEAD_BYTES.max(2 * elements.len()).min(pieces * PIECE));
                sizes.push(elements.capacity());
            }
            sizes.dedup();
            assert_eq!(sizes.len() - 1, if pieces == 40 { 3 } else { 1 }, "{sizes:?}");
            assert_eq!(sizes.last(), Some(&(pieces * PIECE)));
        }
        // Whoever sends more than was announced is refused before, but not trusted here.
        let mut elements = vec![0u8; 8];
        reserve(&mut elements, 8, 4);
        assert!(elements.capacity() >= 16);
    }
}
