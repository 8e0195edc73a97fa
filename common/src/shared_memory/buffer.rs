//! A vector of floats, wherever it lies.

use std::ops::{Deref, DerefMut};

use super::Slot;
use crate::kernel::AlignedFloats;

/// A vector of floats, in memory of this process or in a shared region.
#[derive(Debug)]
pub struct FloatBuffer {
    memory: Memory,
    known_finite: bool,
}

#[derive(Debug)]
enum Memory {
    Private(AlignedFloats),
    Shared(Slot),
}

impl FloatBuffer {
    /// `len` zeros in memory of this process.
    pub fn zeros(len: usize) -> Self {
        Self { memory: Memory::Private(AlignedFloats::zeros(len)), known_finite: true }
    }

    /// A copy of `values` in memory of this process, from a cache line on.
    pub fn copy_of(values: &[f32]) -> Self {
        Self { memory: Memory::Private(values.into()), known_finite: false }
    }

    /// The slot, if it is one.
    pub fn slot(&self) -> Option<&Slot> {
        match &self.memory {
            Memory::Private(_) => None,
            Memory::Shared(slot) => Some(slot),
        }
    }

    /// Whether all floats are known to be finite: this process has found that they are, and has not changed them since.
    /// (Memory that another process hands in is not known.)
    pub fn is_known_finite(&self) -> bool {
        self.known_finite
    }

    /// Says that all floats were found to be finite.
    pub fn set_known_finite(&mut self) {
        self.known_finite = true;
    }
}

impl Default for FloatBuffer {
    fn default() -> Self {
        Self::zeros(0)
    }
}

impl From<Vec<f32>> for FloatBuffer {
    fn from(values: Vec<f32>) -> Self {
        Self::copy_of(&values)
    }
}

impl From<Slot> for FloatBuffer {
    fn from(slot: Slot) -> Self {
        Self { memory: Memory::Shared(slot), known_finite: false }
    }
}

impl Deref for FloatBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.memory {
            Memory::Private(values) => values,
            Memory::Shared(slot) => slot,
        }
    }
}

impl DerefMut for FloatBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.known_finite = false;
        match &mut self.memory {
            Memory::Private(values) => values,
            Memory::Shared(slot) => slot,
        }
    }
}

impl AsRef<[f32]> for FloatBuffer {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

impl Clone for FloatBuffer {
    /// A copy in memory of this process.
    fn clone(&self) -> Self {
        Self { known_finite: self.known_finite, ..Self::copy_of(self) }
    }
}

impl PartialEq for FloatBuffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_forgotten_with_the_first_change() {
        let mut buffer = FloatBuffer::from(vec![1.0, 2.0]);
        assert!(!buffer.is_known_finite(), "nobody has looked");
        buffer.set_known_finite();
        assert!(buffer.is_known_finite() && buffer.clone().is_known_finite());
        buffer[0] = f32::NAN;
        assert!(!buffer.is_known_finite());
    }
}
