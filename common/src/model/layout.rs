//! The layout of a model's parameters in one flat vector.
//!
//! Files and other programs see tensors row by row. In the flat vector, which training works on, a tensor may be stored in
//! another order ([`Storage`]).

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::storage::{PanelMatrix, Storage};
use crate::hash::{DigestBuilder, sha256_of_floats};

/// One parameter tensor in the flat vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterEntry {
    /// For example `encoder.0.conv2d.kernel`.
    pub name: String,
    /// Sizes of its axes, in Keras' order.
    pub shape: Vec<usize>,
    /// Where it lies, in floats.
    pub range: Range<usize>,
    /// In which order.
    pub storage: Storage,
}

impl ParameterEntry {
    /// The tensor as a matrix in panels, if it is stored as one.
    pub fn panels(&self) -> Option<PanelMatrix> {
        match (self.storage, &self.shape[..]) {
            (Storage::Panels, &[rows, columns]) => Some(PanelMatrix { rows, columns }),
            _ => None,
        }
    }

    /// Where in the flat vector an element lies that is counted row by row.
    pub fn place(&self, element: usize) -> usize {
        let within = match self.panels() {
            Some(matrix) => matrix.place(element / matrix.columns, element % matrix.columns),
            None => element,
        };
        self.range.start + within
    }

    /// The tensor row by row, from the flat vector.
    pub fn read<'a>(&self, flat: &'a [f32]) -> Cow<'a, [f32]> {
        match self.panels() {
            Some(matrix) => Cow::Owned(matrix.to_rows(&flat[self.range.clone()])),
            None => Cow::Borrowed(&flat[self.range.clone()]),
        }
    }

    /// Puts the tensor, given row by row, into the flat vector.
    ///
    /// # Panics
    /// When `tensor` has another number of elements.
    pub fn write(&self, tensor: &[f32], flat: &mut [f32]) {
        let stored = &mut flat[self.range.clone()];
        match self.panels() {
            Some(matrix) => matrix.store(tensor, stored),
            None => stored.copy_from_slice(tensor),
        }
    }
}

/// The names, shapes, offsets and orders of all parameters: layer by layer, kernel before bias, without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<ParameterEntry>,
}

impl Layout {
    /// A layout of tensors with their names and shapes. Matrices are stored as `matrices` says, the others by rows.
    pub(super) fn new(tensors: Vec<(String, Vec<usize>)>, matrices: Storage) -> Self {
        let mut offset = 0;
        let entries = tensors
            .into_iter()
            .map(|(name, shape)| {
                let start = offset;
                offset += shape.iter().product::<usize>();
                let storage = if shape.len() == 2 { matrices } else { Storage::Rows };
                ParameterEntry { name, shape, range: start..offset, storage }
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

    /// All tensors, one after the other and each row by row.
    ///
    /// # Panics
    /// When `flat` is shorter than the layout.
    pub fn tensors(&self, flat: &[f32]) -> Vec<f32> {
        let mut tensors = Vec::with_capacity(self.parameters());
        self.entries.iter().for_each(|entry| tensors.extend_from_slice(&entry.read(flat)));
        tensors
    }

    /// SHA-256 of [`Layout::tensors`] as little-endian bytes: the `params_sha256` of a run. It does not depend on how
    /// tensors are stored.
    ///
    /// # Panics
    /// When `flat` is shorter than the layout.
    pub fn sha256(&self, flat: &[f32]) -> String {
        sha256_of_floats(&self.tensors(flat))
    }

    /// A hash of every name, shape, offset and order: two processes with equal hashes mean the same by a parameter's index.
    pub fn hash(&self) -> LayoutHash {
        let mut digest = DigestBuilder::default();
        for entry in &self.entries {
            digest.number(entry.name.len() as u64);
            digest.bytes(entry.name.as_bytes());
            digest.number(entry.shape.len() as u64);
            entry.shape.iter().for_each(|&axis| digest.number(axis as u64));
            digest.number(entry.range.start as u64);
            if let Some(matrix) = entry.panels() {
                digest.number(matrix.panel_of(0).columns as u64);
            }
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
