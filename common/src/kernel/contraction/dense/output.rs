//! What a product writes, and where.

use std::ops::Range;

use crate::kernel::ahead::Ahead;
use crate::kernel::contraction::Panel;
use crate::kernel::isa::Isa;
use crate::kernel::transpose::{MatrixShape, transpose};
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

/// Some rows of a panel, and the panel's part of the row behind the matrix, if it is one of them.
struct PanelRows {
    columns: usize,
    inside: *mut f32,
    rows: usize,
    behind: *mut f32,
    is_behind: bool,
}

impl PanelRows {
    fn lens(&self) -> [usize; 2] {
        [self.rows * self.columns, if self.is_behind { self.columns } else { 0 }]
    }

    /// The rows of the panel, and of the row behind the matrix.
    ///
    /// # Safety
    /// The output holds the rows, and nobody writes them meanwhile.
    unsafe fn read(&self) -> [&[f32]; 2] {
        let [inside, behind] = self.lens();
        // SAFETY: the caller's promise.
        unsafe { [std::slice::from_raw_parts(self.inside, inside), std::slice::from_raw_parts(self.behind, behind)] }
    }

    /// The same to be written.
    ///
    /// # Safety
    /// The output holds the rows, and nobody else reads or writes them meanwhile.
    unsafe fn write(&mut self) -> [&mut [f32]; 2] {
        let [inside, behind] = self.lens();
        // SAFETY: the caller's promise; the row behind the matrix does not overlap it.
        unsafe {
            [std::slice::from_raw_parts_mut(self.inside, inside), std::slice::from_raw_parts_mut(self.behind, behind)]
        }
    }
}

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
    /// Where the stretches of some columns of a row lie: those of each panel, or of the row behind the matrix.
    fn stretches(&self, row: usize, columns: Range<usize>) -> impl Iterator<Item = (*mut f32, usize)> {
        let (start, matrix) = (self.start, self.matrix.expect("an output in panels"));
        let mut rest = columns;
        std::iter::from_fn(move || {
            let column = rest.start;
            let stored = (!rest.is_empty()).then(|| matrix.panel_of(column))?;
            rest.start = rest.end.min(stored.start + stored.columns);
            let place = if row < matrix.rows {
                stored.range.start + row * stored.columns + column - stored.start
            } else {
                matrix.elements() + column
            };
            Some((start.wrapping_add(place), rest.start - column))
        })
    }

    /// Copies some columns of some rows to rows of `width` floats.
    ///
    /// # Safety
    /// The output holds the rows, and nobody writes these columns meanwhile.
    pub(super) unsafe fn read(&self, rows: Range<usize>, columns: Range<usize>, to: &mut [f32], width: usize) {
        for (row, mut to) in rows.zip(to.chunks_exact_mut(width)) {
            for (place, len) in self.stretches(row, columns.clone()) {
                // SAFETY: the caller's promise.
                let stored = unsafe { std::slice::from_raw_parts(place, len) };
                to.split_off_mut(..len).expect("room for the columns").copy_from_slice(stored);
            }
        }
    }

    /// Writes some columns of some rows from rows of `width` floats.
    ///
    /// # Safety
    /// The output holds the rows, and nobody else reads or writes these columns meanwhile.
    pub(super) unsafe fn write(&self, rows: Range<usize>, columns: Range<usize>, from: &[f32], width: usize) {
        for (row, mut from) in rows.zip(from.chunks_exact(width)) {
            for (place, len) in self.stretches(row, columns.clone()) {
                // SAFETY: the caller's promise.
                let stored = unsafe { std::slice::from_raw_parts_mut(place, len) };
                stored.copy_from_slice(from.split_off(..len).expect("as many values as columns"));
            }
        }
    }

    /// Copies some rows of a whole panel, transposed, to rows of `width` floats: one for each column.
    ///
    /// # Safety
    /// As for [`OutputPlaces::read`].
    pub(super) unsafe fn read_transposed(
        &self,
        isa: Isa,
        rows: Range<usize>,
        columns: Range<usize>,
        to: &mut [f32],
        width: usize,
    ) {
        let stored = self.panel_rows(rows, columns);
        // SAFETY: the caller's promise.
        let [inside, behind] = unsafe { stored.read() };
        let shape = MatrixShape::dense(inside.len() / stored.columns, stored.columns);
        transpose(isa, inside, shape, to, width);
        to.chunks_exact_mut(width).zip(behind).for_each(|(to, &value)| to[shape.rows] = value);
    }

    /// Writes some rows of a whole panel from their transpose: a row of `width` floats for each column.
    ///
    /// # Safety
    /// As for [`OutputPlaces::write`].
    pub(super) unsafe fn write_transposed(
        &self,
        isa: Isa,
        rows: Range<usize>,
        columns: Range<usize>,
        from: &[f32],
        width: usize,
    ) {
        let mut stored = self.panel_rows(rows, columns);
        let columns = stored.columns;
        // SAFETY: the caller's promise.
        let [inside, behind] = unsafe { stored.write() };
        let shape = MatrixShape { rows: columns, columns: inside.len() / columns, stride: width };
        transpose(isa, from, shape, inside, columns);
        from.chunks_exact(width).zip(behind).for_each(|(from, value)| *value = from[shape.columns]);
    }

    /// Some rows of a whole panel.
    fn panel_rows(&self, rows: Range<usize>, columns: Range<usize>) -> PanelRows {
        let matrix = self.matrix.expect("an output in panels");
        let stored = matrix.panel_of(columns.start);
        assert_eq!(columns, stored.start..stored.start + stored.columns, "a whole panel");
        let inside = rows.start.min(matrix.rows)..rows.end.min(matrix.rows);
        PanelRows {
            columns: stored.columns,
            inside: self.start.wrapping_add(stored.range.start + inside.start * stored.columns),
            rows: inside.len(),
            behind: self.start.wrapping_add(matrix.elements() + stored.start),
            is_behind: rows.contains(&matrix.rows),
        }
    }

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
