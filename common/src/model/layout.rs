//! The layout of a model's parameters in one flat vector.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::hash::DigestBuilder;

/// One parameter tensor in the flat vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterEntry {
    /// For example `encoder.0.conv2d.kernel`.
    pub name: String,
    /// Sizes of its axes, in Keras' order.
    pub shape: Vec<usize>,
    /// Where it lies, in floats.
    pub range: Range<usize>,
}

/// The names, shapes and offsets of all parameters: layer by layer, kernel before bias, without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<ParameterEntry>,
}

impl Layout {
    pub(super) fn new(tensors: Vec<(String, Vec<usize>)>) -> Self {
        let mut offset = 0;
        let entries = tensors
            .into_iter()
            .map(|(name, shape)| {
                let start = offset;
                offset += shape.iter().product::<usize>();
                ParameterEntry { name, shape, range: start..offset }
            })
            .collect();
        Self { entries }
    }

    /// The tensors, in the order in which they lie.
    pub fn entries(&self) -> &[ParameterEntry] {
        &self.entries
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<&ParameterEntry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// Number of floats in the flat vector.
    pub fn parameters(&self) -> usize {
        self.entries.last().map_or(0, |entry| entry.range.end)
    }

    /// A hash of every name, shape and offset: two processes with equal hashes mean the same by a parameter's index.
    pub fn hash(&self) -> LayoutHash {
        let mut digest = DigestBuilder::default();
        for entry in &self.entries {
            digest.number(entry.name.len() as u64);
            digest.bytes(entry.name.as_bytes());
            digest.number(entry.shape.len() as u64);
            entry.shape.iter().for_each(|&axis| digest.number(axis as u64));
            digest.number(entry.range.start as u64);
        }
        LayoutHash((digest.finish().0 >> 64) as u64)
    }
}

/// See [`Layout::hash`]. Shown as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayoutHash(pub u64);

impl fmt::Display for LayoutHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
