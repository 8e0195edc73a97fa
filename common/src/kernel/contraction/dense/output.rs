//! What a product writes, and where.

use std::ops::Range;

use crate::kernel::ahead::Ahead;
use crate::kernel::contraction::Panel;
use crate::model::{PANEL_COLUMNS, PanelMatrix};

/// How far ahead of the rows at hand memory is fetched that will be written: a tile of the largest height.
const ROWS_AHEAD: usize = 8;

/// What a product writes.
pub(super) enum Output<'a> {
    /// Rows of all columns, one after the other.
    Rows(&'a mut [f32]),
    /// A matrix in panels; behind it, one more row of the product, if there is one: the gradient of a bias.
    Panels(PanelMatrix, &'a mut [f32]),
}

impl Output<'_> {
    /// Whether there is room for so many rows.
    pub(super) fn holds(&self, rows: usize, columns: usize) -> bool {
        match self {
            Self::Rows(output) => output.len() >= rows * columns,
            Self::Panels(matrix, output) => {
                matrix.columns == columns && rows <= matrix.rows + 1 && output.len() >= rows.max(matrix.rows) * columns
            }
        }
    }

    pub(super) fn places(self) -> OutputPlaces {
        match self {
            Self::Rows(output) => OutputPlaces { matrix: None, start: output.as_mut_ptr() },
            Self::Panels(matrix, output) => OutputPlaces { matrix: Some(matrix), start: output.as_mut_ptr() },
        }
    }
}

/// An output to which several threads write, each to places of its own.
#[derive(Clone, Copy)]
pub(super) struct OutputPlaces {
    matrix: Option<PanelMatrix>,
    start: *mut f32,
}

// SAFETY: an address may be known to any thread. Who writes through it says why nobody else does.
unsafe impl Send for OutputPlaces {}
// SAFETY: as above.
unsafe impl Sync for OutputPlaces {}

/// Rows of a panel that one block can write.
pub(super) struct OutputPart {
    pub(super) rows: Range<usize>,
    pub(super) spacing: Spacing,
    /// Where the panel's first row is, or the only one.
    pub(super) c: *mut f32,
    /// Memory that will be written.
    pub(super) ahead: Option<Ahead>,
}

/// How far rows are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spacing {
    /// As in whole panels, or as in an output by rows.
    Wide,
    /// As in the last panel, where it is narrower.
    Narrow,
    /// There is only one.
    Alone,
}

impl OutputPlaces {
    /// The places of some rows of a panel.
    pub(super) fn parts(&self, panel: &Panel, rows: Range<usize>) -> impl Iterator<Item = OutputPart> {
        let at = |place: usize| self.start.wrapping_add(place);
        let (in_matrix, behind) = match self.matrix {
            None => (OutputPart { rows, spacing: Spacing::Wide, c: at(panel.start), ahead: None }, None),
            Some(matrix) => {
                let stored = matrix.panel_of(panel.start);
                let c = at(stored.range.start + panel.start - stored.start);
                let inside = rows.start..rows.end.min(matrix.rows);
                let is_narrow = stored.columns < PANEL_COLUMNS.min(matrix.columns);
                let spacing = if is_narrow { Spacing::Narrow } else { Spacing::Wide };
                let soon = c.wrapping_add((inside.start + ROWS_AHEAD) * stored.columns);
                let ahead = Ahead::columns(soon, [inside.len(), panel.columns], stored.columns);
                let behind = rows.contains(&matrix.rows).then(|| OutputPart {
                    rows: matrix.rows..matrix.rows + 1,
                    spacing: Spacing::Alone,
                    c: at(matrix.elements() + panel.start),
                    ahead: None,
                });
                (OutputPart { rows: inside, spacing, c, ahead: Some(ahead) }, behind)
            }
        };
        [Some(in_matrix).filter(|part| !part.rows.is_empty()), behind].into_iter().flatten()
    }
}
