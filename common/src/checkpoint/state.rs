//! The coordinator's own state as bytes. The only place that knows `bincode`.
//!
//! [`super::format`] hands over bytes only after their checksum was found right, so that what is decoded here was written
//! by a coordinator; the limit holds all the same.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};

use super::State;

/// The largest state: a few kilobytes of configuration, and some 20 bytes for each of 500,000 worker processes.
pub(super) const MAX_STATE_BYTES: usize = 16 << 20;

const CONFIGURATION: Configuration<LittleEndian, Fixint, Limit<MAX_STATE_BYTES>> =
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<MAX_STATE_BYTES>();

/// The bytes of a state.
///
/// # Errors
/// When it is larger than [`MAX_STATE_BYTES`].
pub(super) fn encode(state: &State) -> Result<Vec<u8>, String> {
    let bytes = bincode::serde::encode_to_vec(state, CONFIGURATION).map_err(|error| error.to_string())?;
    match bytes.len() {
        length if length > MAX_STATE_BYTES => Err(format!("{length} bytes; there can be {MAX_STATE_BYTES}")),
        _ => Ok(bytes),
    }
}

/// The state that was encoded as `bytes`, all of them.
///
/// # Errors
/// What is wrong with them.
pub(super) fn decode(bytes: &[u8]) -> Result<State, String> {
    let (state, read) = bincode::serde::decode_from_slice(bytes, CONFIGURATION).map_err(|error| error.to_string())?;
    if read != bytes.len() {
        return Err(format!("it ends after {read} of {} bytes", bytes.len()));
    }
    Ok(state)
}
