//! What can be wrong with a message: which message, which field, and the offending value.

use std::fmt;

/// A message that means nothing: `Assign.leaves[3].leaf: 70000 is above 65535`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}{}{field}: {fault}", if field.is_empty() { "" } else { "." })]
pub struct WireError {
    /// The outermost message, for example `Assign`.
    pub message: &'static str,
    /// Path of the field in it, for example `leaves[3].inline.data`; empty if the whole message is meant.
    pub field: String,
    /// What is wrong.
    pub fault: Fault,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A message or a oneof that must be there is not.
    #[error("is missing")]
    Missing,
    /// A number that no value of the enum has, or the unspecified one.
    #[error("{value} is no {name}")]
    UnknownEnum {
        /// The enum.
        name: &'static str,
        /// Its number.
        value: i32,
    },
    /// A number of shards over which there is no reduction tree.
    #[error("{value} is no power of two from 1 to 65536")]
    NotAShardCount {
        /// The number.
        value: u32,
    },
    /// Zero where there must be something.
    #[error("is 0, but must be at least 1")]
    Zero,
    /// A number, length or size above its limit.
    #[error("{value} is above {limit}{unit}")]
    TooLarge {
        /// The number; the largest `u64` if it does not fit one.
        value: u64,
        /// The largest that is taken.
        limit: u64,
        /// Of what, with a leading space; may be empty.
        unit: &'static str,
    },
    /// Bytes that are no whole number of elements.
    #[error("{bytes} bytes are no multiple of {multiple}")]
    Ragged {
        /// Number of bytes.
        bytes: usize,
        /// Bytes of an element.
        multiple: usize,
    },
    /// A digest that has not 16 bytes.
    #[error("a digest has 16 bytes, not {bytes}")]
    DigestLength {
        /// Number of bytes.
        bytes: usize,
    },
    /// A number of things that another part of the message contradicts.
    #[error("there are {got} {things}, but {expected} were expected")]
    Count {
        /// What was counted.
        things: &'static str,
        /// How many there should be.
        expected: u64,
        /// How many there are.
        got: u64,
    },
    /// Damaged data.
    #[error("the checksum of the data is {computed:016x}, but {stated:016x} was announced")]
    Checksum {
        /// What the sender wrote.
        stated: u64,
        /// What the data has.
        computed: u64,
    },
    /// A list that must ascend does not.
    #[error("{value} follows {before}, but the list must ascend")]
    NotAscending {
        /// An entry.
        before: u32,
        /// The one that follows it.
        value: u32,
    },
    /// A message that must not come now.
    #[error("expected {expected}, but {got} came")]
    OutOfOrder {
        /// What may come.
        expected: &'static str,
        /// What came.
        got: &'static str,
    },
}

impl WireError {
    pub(crate) fn new(message: &'static str, field: impl fmt::Display, fault: Fault) -> Self {
        Self { message, field: field.to_string(), fault }
    }

    pub(crate) fn missing(message: &'static str, field: impl fmt::Display) -> Self {
        Self::new(message, field, Fault::Missing)
    }

    /// The same error, seen from the message that contains the failed one as `field`.
    pub(crate) fn within(mut self, message: &'static str, field: impl fmt::Display) -> Self {
        self.message = message;
        self.field = if self.field.is_empty() { field.to_string() } else { format!("{field}.{}", self.field) };
        self
    }

    /// Whether the message was damaged on its way, rather than wrongly made: sending it again may help.
    pub fn is_damage(&self) -> bool {
        matches!(self.fault, Fault::Checksum { .. })
    }
}
