//! A checkpoint as a file.
//!
//! ```text
//! magic        8 bytes   "lockstp\n"
//! format       4         version of this format
//! state        4         length of the state, in bytes
//! parameters   8         number of parameters
//! digest      16         of the 24 bytes so far
//! state                  the coordinator's own state
//! parameters             32-bit floats
//! moments                the first moments, then the second, as many floats each
//! digest      16         of everything after the first digest
//! ```
//!
//! Numbers are little-endian, digests XXH3 with 128 bits. The lengths are believed only after their digest was found
//! right and the file was found to be just as long as they say. So a file that is torn, cut off, too long or has a wrong
//! bit is found out, and none takes more memory than its own length.

use std::io::{self, Read, Write};

use super::state::{self, MAX_STATE_BYTES};
use super::{Checkpoint, CheckpointError, State};
use crate::hash::{Digest, DigestBuilder, for_le_bytes};
use crate::optim::adam::Moments;

const MAGIC: [u8; 8] = *b"lockstp\n";

/// Version of the format. Raised whenever the file or [`State`] changes.
const FORMAT: u32 = 2;

const DIGEST_BYTES: usize = 16;
/// Magic, format, state, parameters, digest.
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + DIGEST_BYTES;
/// Parameters and two moments.
const VECTORS: u64 = 3;

/// Floats that are read or written at a time: 1 MiB, so that what is hashed is still in the cache when it is copied.
const PIECE_FLOATS: usize = 1 << 18;

/// Writes a checkpoint of borrowed parts.
///
/// # Errors
/// Those of `out`; or when the state is too large.
///
/// # Panics
/// When the moments are not as many as the parameters.
pub fn write(out: &mut dyn Write, state: &State, parameters: &[f32], moments: &Moments) -> io::Result<()> {
    assert!(
        [&moments.first, &moments.second].iter().all(|moments| moments.len() == parameters.len()),
        "there are two moments for each parameter"
    );
    let state = state::encode(state).map_err(|reason| io::Error::other(format!("the state: {reason}")))?;
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend(MAGIC);
    header.extend(FORMAT.to_le_bytes());
    header.extend((state.len() as u32).to_le_bytes());
    header.extend((parameters.len() as u64).to_le_bytes());
    header.extend(Digest::of(&header).0.to_le_bytes());
    out.write_all(&header)?;

    let mut digest = DigestBuilder::default();
    digest.bytes(&state);
    out.write_all(&state)?;
    for floats in [parameters, &moments.first, &moments.second] {
        for piece in floats.chunks(PIECE_FLOATS) {
            digest.floats(piece);
            let mut written = Ok(());
            for_le_bytes(piece, |bytes| {
                if written.is_ok() {
                    written = out.write_all(bytes);
                }
            });
            written?;
        }
    }
    out.write_all(&digest.finish().0.to_le_bytes())
}

/// Reads a checkpoint of `length` bytes.
///
/// # Errors
/// [`CheckpointError`] when it is not whole, or not ours.
pub fn read(mut file: impl Read, length: u64) -> Result<Checkpoint, CheckpointError> {
    if length < HEADER_BYTES as u64 {
        return damaged(format!("it has {length} bytes, fewer than a header's {HEADER_BYTES}"));
    }
    let mut header = [0; HEADER_BYTES];
    fill(&mut file, &mut header)?;
    let header = Header::parse(&header)?;
    if header.file_bytes() != Some(length) {
        return damaged(format!(
            "it has {length} bytes; with {} parameters it must have {}",
            header.parameters,
            header.file_bytes().map_or("more than there can be".to_owned(), |bytes| bytes.to_string())
        ));
    }
    let mut digest = DigestBuilder::default();
    let mut state = vec![0; header.state_bytes];
    fill(&mut file, &mut state)?;
    digest.bytes(&state);
    // It was compared with the file's length.
    let parameters = header.parameters as usize;
    let mut vector = || floats(&mut file, parameters, &mut digest);
    let (parameters, first, second) = (vector()?, vector()?, vector()?);
    let mut expected = [0; DIGEST_BYTES];
    fill(&mut file, &mut expected)?;
    if digest.finish() != Digest(u128::from_le_bytes(expected)) {
        return damaged("its content does not fit its checksum".to_owned());
    }
    let state = state::decode(&state).map_err(CheckpointError::State)?;
    Ok(Checkpoint { state, parameters, moments: Moments { first: first.into(), second: second.into() } })
}

struct Header {
    state_bytes: usize,
    parameters: u64,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, CheckpointError> {
        let (content, digest) = bytes.split_at(HEADER_BYTES - DIGEST_BYTES);
        if content[..8] != MAGIC {
            return damaged("it does not begin like a checkpoint".to_owned());
        }
        if Digest::of(content).0.to_le_bytes() != digest {
            return damaged("its header does not fit its checksum".to_owned());
        }
        let number = |at: usize| u32::from_le_bytes([content[at], content[at + 1], content[at + 2], content[at + 3]]);
        let found = number(8);
        if found != FORMAT {
            return Err(CheckpointError::Format { found, known: FORMAT });
        }
        let state_bytes = number(12) as usize;
        if state_bytes > MAX_STATE_BYTES {
            return damaged(format!("its state has {state_bytes} bytes; there can be {MAX_STATE_BYTES}"));
        }
        Ok(Self { state_bytes, parameters: u64::from(number(16)) | u64::from(number(20)) << 32 })
    }

    /// How long the file must be, if it can be as long at all.
    fn file_bytes(&self) -> Option<u64> {
        let floats = self.parameters.checked_mul(VECTORS * 4)?;
        floats.checked_add((HEADER_BYTES + self.state_bytes + DIGEST_BYTES) as u64)
    }
}

fn damaged<T>(reason: String) -> Result<T, CheckpointError> {
    Err(CheckpointError::Damaged(reason))
}

fn fill(file: &mut impl Read, bytes: &mut [u8]) -> Result<(), CheckpointError> {
    file.read_exact(bytes).map_err(|error| match error.kind() {
        // It was longer a moment ago.
        io::ErrorKind::UnexpectedEof => CheckpointError::Damaged("it ends too early".to_owned()),
        _ => CheckpointError::Io(error),
    })
}

fn floats(file: &mut impl Read, count: usize, digest: &mut DigestBuilder) -> Result<Vec<f32>, CheckpointError> {
    let mut floats = vec![0.0f32; count];
    for piece in floats.chunks_mut(PIECE_FLOATS) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(piece);
        fill(file, bytes)?;
        digest.bytes(bytes);
        if cfg!(target_endian = "big") {
            piece.iter_mut().for_each(|value| *value = f32::from_bits(u32::from_le(value.to_bits())));
        }
    }
    Ok(floats)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::{KnownWorker, LedgerPosition, Shown, Skipped, Standing};
    use crate::model::LayoutHash;
    use crate::protocol::MemberId;

    fn checkpoint(parameters: usize) -> Checkpoint {
        let member = MemberId { worker: 2, incarnation: 1001 };
        let state = State {
            version: "0.1.0".into(),
            config: "name = \"x\"\n".into(),
            layout: LayoutHash(7),
            fingerprint: Digest(8),
            data: Digest(9),
            restarts: 1,
            standing: Standing {
                rounds: 120,
                evaluated: 71,
                epoch_loss: 0.1 + 0.2,
                epoch_samples: 4,
                samples_seen: 5,
                workers_lost: 6,
                skipped: Skipped { rounds: 3, in_a_row: 2, rate_cuts: 1 },
                workers: vec![KnownWorker { process: u64::MAX, member, barred: Some("it was wrong".to_owned()) }],
            },
            ledger: LedgerPosition { bytes: 1234, chain: Digest(u128::MAX) },
            events_bytes: 99,
            shown: Shown {
                loss: Some(f64::NAN),
                train_loss: Some(-0.0),
                validation_loss: None,
                training_time: Duration::from_micros(1),
            },
        };
        let vector = |scale: f32| (0..parameters).map(|i| i as f32 * scale - 1.0).collect::<Vec<f32>>();
        let moments = Moments { first: vector(1e-40).into(), second: vector(f32::MAX).into() };
        Checkpoint { state, parameters: vector(0.1), moments }
    }

    fn bytes(checkpoint: &Checkpoint) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, &checkpoint.state, &checkpoint.parameters, &checkpoint.moments).unwrap();
        bytes
    }

    fn read_bytes(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
        read(bytes, bytes.len() as u64)
    }

    #[test]
    fn a_checkpoint_comes_back_with_every_bit() {
        for parameters in [0, 1, 5, PIECE_FLOATS + 3] {
            let written = checkpoint(parameters);
            let file = bytes(&written);
            let read = read_bytes(&file).unwrap();
            assert!(read.state.shown.loss.unwrap().is_nan());
            // Written again it is the same file, to the last bit: also NaN and -0 came back.
            assert_eq!(bytes(&read), file);
            assert_eq!((read.parameters, read.moments), (written.parameters, written.moments));
        }
    }

    #[test]
    fn a_wrong_bit_anywhere_is_found() {
        let whole = bytes(&checkpoint(5));
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut file = whole.clone();
                file[at] ^= 1 << bit;
                assert!(matches!(read_bytes(&file), Err(CheckpointError::Damaged(_))), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn a_file_cut_off_anywhere_or_too_long_is_found() {
        let whole = bytes(&checkpoint(5));
        for length in 0..whole.len() {
            let cut = &whole[..length];
            assert!(matches!(read_bytes(cut), Err(CheckpointError::Damaged(_))), "{length} bytes");
            // Also if it is cut while it is read.
            assert!(matches!(read(cut, whole.len() as u64), Err(CheckpointError::Damaged(_))), "{length} bytes");
            // A torn write: the length is right, the rest was never written.
            let torn = [cut, &vec![0; whole.len() - length]].concat();
            assert!(torn == whole || matches!(read_bytes(&torn), Err(CheckpointError::Damaged(_))), "{length} bytes");
        }
        assert!(matches!(read_bytes(&[&whole[..], b"\0"].concat()), Err(CheckpointError::Damaged(_))));
    }

    /// A file with another header, whose digest is right.
    fn with_header(edit: impl Fn(&mut [u8])) -> String {
        let mut file = bytes(&checkpoint(5));
        edit(&mut file[..HEADER_BYTES - DIGEST_BYTES]);
        let digest = Digest::of(&file[..HEADER_BYTES - DIGEST_BYTES]).0.to_le_bytes();
        file[HEADER_BYTES - DIGEST_BYTES..HEADER_BYTES].copy_from_slice(&digest);
        read_bytes(&file).unwrap_err().to_string()
    }

    #[test]
    fn impossible_sizes_and_other_formats_are_refused_before_memory_is_taken() {
        assert!(with_header(|header| header[8] = 9).contains(&format!("format 9, this program reads format {FORMAT}")));
        let huge = with_header(|header| header[16..24].fill(0xff));
        assert!(huge.contains("more than there can be"), "{huge}");
        let large = with_header(|header| header[16..24].copy_from_slice(&(1u64 << 40).to_le_bytes()));
        assert!(large.contains("with 1099511627776 parameters it must have 13194139"), "{large}");
        let state = with_header(|header| header[12..16].fill(0xff));
        assert!(state.contains("its state has 4294967295 bytes"), "{state}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_behind_a_right_checksum_never_panic(
            state in proptest::collection::vec(any::<u8>(), 0..600)
        ) {
            let _ = state::decode(&state);
        }

        #[test]
        fn arbitrary_files_never_panic(file in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(read_bytes(&file).is_err());
        }
    }
}
