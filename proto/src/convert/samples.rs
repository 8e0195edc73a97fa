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

/// For how many times as much as has come there is room: enough for a shard of some megabytes after its first piece.
const ROOM_AHEAD: usize = 32;

/// Puts pieces together again. Memory is taken as data arrives, never for what is merely announced: see [`ROOM_AHEAD`].
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

/// Makes room for `more` elements: for all of them, unless those are [`ROOM_AHEAD`] times as many as have come.
fn reserve<T>(elements: &mut Vec<T>, more: usize, all: u64) {
    if more <= elements.capacity() - elements.len() {
        return;
    }
    let come = elements.len() + more;
    let room = come.saturating_mul(ROOM_AHEAD).min(usize::try_from(all).unwrap_or(usize::MAX)).max(come);
    elements.reserve_exact(room - elements.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: pieces of 64 KiB, of few or many bytes in all. Property: room is made once for few; it never exceeds what is
    /// announced, or a fixed multiple of what came.
    #[test]
    fn room_is_made_for_all_if_that_is_little() {
        const PIECE: usize = 64 << 10;
        for (pieces, times) in [(1, 1), (ROOM_AHEAD, 1), (3 * ROOM_AHEAD, 2)] {
            let mut elements: Vec<u8> = Vec::new();
            let mut rooms = Vec::new();
            for _ in 0..pieces {
                reserve(&mut elements, PIECE, (pieces * PIECE) as u64);
                elements.resize(elements.len() + PIECE, 0);
                assert!(elements.capacity() <= (ROOM_AHEAD * elements.len()).min(pieces * PIECE));
                rooms.push(elements.capacity());
            }
            rooms.dedup();
            assert_eq!(rooms.len(), times, "{rooms:?}");
            assert_eq!(rooms.last(), Some(&(pieces * PIECE)));
        }
        // Whoever sends more than was announced is refused before, but not trusted here.
        let mut elements = vec![0u8; 8];
        reserve(&mut elements, 8, 4);
        assert!(elements.capacity() >= 16);
    }
}
