//! Vectors in chunks: how they travel, and how a version of the parameters gets its digest.

use crate::hash::{Digest, DigestBuilder};

/// Floats in a chunk of a tensor: 1 MiB. A constant of the mathematics too: the parameter digest of a round is made of
/// the digests of its chunks.
pub const CHUNK_FLOATS: usize = 1 << 18;

/// The chunks of a vector of `floats` floats: index and range of each, first to last.
pub fn chunks(floats: usize) -> impl DoubleEndedIterator<Item = (u32, std::ops::Range<usize>)> + Clone {
    (0..floats.div_ceil(CHUNK_FLOATS)).map(move |i| (i as u32, i * CHUNK_FLOATS..((i + 1) * CHUNK_FLOATS).min(floats)))
}

/// The digest of a version of the parameters: of its chunks' digests, so that it can be made chunk by chunk.
pub fn parameters_digest(parameters: &[f32]) -> Digest {
    combine_chunk_digests(chunks(parameters.len()).map(|(_, range)| Digest::of_floats(&parameters[range])))
}

/// See [`parameters_digest`].
pub fn combine_chunk_digests(chunks: impl Iterator<Item = Digest>) -> Digest {
    let mut digest = DigestBuilder::default();
    chunks.for_each(|chunk| digest.bytes(&chunk.0.to_le_bytes()));
    digest.finish()
}
