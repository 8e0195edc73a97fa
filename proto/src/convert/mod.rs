//! Between wire and domain: `From` for values that go out, `TryFrom` with a [`WireError`] for messages that come in.
//!
//! What belongs to several messages has a reader and a writer: [`SessionReader`] and [`Downward`] for a session
//! (assignments may come in pieces), [`ShardReader`] and [`shard_messages`] for a shard.

mod assignment;
mod control;
mod exchange;
mod identity;
mod job;
mod model;
mod monitor;
mod route;
mod samples;
mod session;
mod shard;

pub use control::stop_reason;
pub use exchange::{
    ExchangeDown, ExchangeUp, Hello, node_chunk, node_slot, parameter_chunk, parameter_slot, release_gradient,
    release_parameters,
};
pub use job::sample_bytes;
pub use monitor::workers;
pub use route::{Downward, Messages, Upward};
pub use session::{SessionDown, SessionReader, SessionUp};
pub use shard::{ShardReader, ShardRequest, samples_of_a_message, shard_messages};

use std::time::Duration;

use bytes::Bytes;
use lockstep_common::hash::Digest;

use crate::limits::MAX_TEXT_BYTES;
use crate::wire_error::{Fault, WireError};

/// A wire enum that travels as an `i32`.
pub(crate) trait WireEnum: Sized {
    fn from_wire(value: i32) -> Result<Self, Fault>;
}

/// Maps the values of a domain enum to those of the same name in a wire enum, and back.
macro_rules! wire_enum {
    ($name:ident, $($value:ident),+ $(,)?) => {
        impl From<$name> for $crate::v1::$name {
            fn from(value: $name) -> Self {
                match value {
                    $($name::$value => Self::$value),+
                }
            }
        }

        impl $crate::convert::WireEnum for $name {
            fn from_wire(value: i32) -> Result<Self, $crate::Fault> {
                match $crate::v1::$name::try_from(value) {
                    $(Ok($crate::v1::$name::$value) => Ok(Self::$value),)+
                    Ok($crate::v1::$name::Unspecified) | Err(_) => {
                        Err($crate::Fault::UnknownEnum { name: stringify!($name), value })
                    }
                }
            }
        }
    };
}
pub(crate) use wire_enum;

/// Gives a fault its place.
pub(crate) trait At<T> {
    fn at(self, message: &'static str, field: &str) -> Result<T, WireError>;
}

impl<T> At<T> for Result<T, Fault> {
    fn at(self, message: &'static str, field: &str) -> Result<T, WireError> {
        self.map_err(|fault| WireError::new(message, field, fault))
    }
}

/// The domain value of a message field that must be there.
pub(crate) fn required<W, D>(message: &'static str, field: &str, value: Option<W>) -> Result<D, WireError>
where
    D: TryFrom<W, Error = WireError>,
{
    let value = value.ok_or_else(|| WireError::missing(message, field))?;
    D::try_from(value).map_err(|error| error.within(message, field))
}

/// The domain values of a repeated message field.
pub(crate) fn each<W, D>(message: &'static str, field: &str, values: Vec<W>) -> Result<Vec<D>, WireError>
where
    D: TryFrom<W, Error = WireError>,
{
    let one = |(i, value)| D::try_from(value).map_err(|error| error.within(message, format!("{field}[{i}]")));
    values.into_iter().enumerate().map(one).collect()
}

pub(crate) fn at_most(value: u64, limit: u64, unit: &'static str) -> Result<(), Fault> {
    if value > limit { Err(Fault::TooLarge { value, limit, unit }) } else { Ok(()) }
}

pub(crate) fn size(value: u64) -> Result<usize, Fault> {
    usize::try_from(value).map_err(|_| Fault::TooLarge { value, limit: usize::MAX as u64, unit: "" })
}

/// A peer's text: refused if it is long; control characters, which could drive a terminal, are replaced.
pub(crate) fn text(value: String) -> Result<String, Fault> {
    at_most(value.len() as u64, MAX_TEXT_BYTES as u64, " bytes")?;
    let unsafe_to_show = |c: char| c.is_control() && c != '\n' && c != '\t';
    Ok(if value.contains(unsafe_to_show) { value.replace(unsafe_to_show, "\u{fffd}") } else { value })
}

/// A text for people, cut to `limit` bytes at a character's edge.
pub(crate) fn clip(mut value: String, limit: usize) -> String {
    let end = (0..=limit.min(value.len())).rev().find(|&end| value.is_char_boundary(end)).unwrap_or(0);
    value.truncate(end);
    value
}

/// A digest in the order in which it is written.
pub(crate) fn digest_bytes(digest: Digest) -> Bytes {
    Bytes::copy_from_slice(&digest.0.to_be_bytes())
}

pub(crate) fn digest(bytes: &[u8]) -> Result<Digest, Fault> {
    let bytes: [u8; 16] = bytes.try_into().map_err(|_| Fault::DigestLength { bytes: bytes.len() })?;
    Ok(Digest(u128::from_be_bytes(bytes)))
}

/// Whole microseconds; the largest number for durations of more than 584,000 years.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
