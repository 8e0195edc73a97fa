//! Memory for operands of the kernels.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// A cache line, and the widest vector.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

/// A slice of floats that starts at a cache line: a vector that crosses the border of two lines costs two accesses.
#[derive(Default)]
pub struct AlignedFloats {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedFloats {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        Self { lines: vec![Line([0.0; 16]); len.div_ceil(16)], len }
    }
}

impl From<&[f32]> for AlignedFloats {
    /// A copy.
    fn from(values: &[f32]) -> Self {
        let mut copy = Self::zeros(values.len());
        copy.copy_from_slice(values);
        copy
    }
}

impl From<Vec<f32>> for AlignedFloats {
    /// A copy.
    fn from(values: Vec<f32>) -> Self {
        Self::from(&values[..])
    }
}

impl Clone for AlignedFloats {
    fn clone(&self) -> Self {
        Self { lines: self.lines.clone(), len: self.len }
    }

    /// Uses the memory that is there.
    fn clone_from(&mut self, source: &Self) {
        self.lines.clone_from(&source.lines);
        self.len = source.len;
    }
}

impl PartialEq for AlignedFloats {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Deref for AlignedFloats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a line is 16 floats without padding, and there are lines for at least `len` floats.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for AlignedFloats {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above; the lines are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl fmt::Debug for AlignedFloats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AlignedFloats").field(&&**self).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_length_asked_for_from_a_cache_line_on() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let mut floats = AlignedFloats::zeros(len);
            assert_eq!(floats.len(), len);
            assert!(floats.iter().all(|&value| value == 0.0));
            assert_eq!(floats.as_ptr().align_offset(64), 0);
            floats.fill(3.0);
            assert_eq!(floats.clone()[..], vec![3.0; len][..]);
        }
    }
}
