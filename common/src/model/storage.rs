//! How the elements of a parameter tensor follow each other in the flat vector.

use std::ops::Range;

/// Columns of a panel: four of the widest vectors, the width of the microkernel's largest tile.
pub const PANEL_COLUMNS: usize = 64;

/// An order of a tensor's elements in the flat vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Row by row, as in files.
    Rows,
    /// A matrix in panels; see [`PanelMatrix`].
    Panels,
}

/// A matrix that lies in panels of [`PANEL_COLUMNS`] columns, one after the other, each row by row. The last panel may be
/// narrower.
///
/// A product goes through all rows of a panel, then through the next panel. So it reads or writes memory in one stretch,
/// which a row-major matrix would make a few cache lines of every page of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PanelMatrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
}

/// A panel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredPanel {
    /// Where it lies.
    pub range: Range<usize>,
    /// The column that it starts from.
    pub start: usize,
    /// Columns of it: from one row to the next one.
    pub columns: usize,
}

impl PanelMatrix {
    /// Number of elements.
    pub fn elements(self) -> usize {
        self.rows * self.columns
    }

    /// The panel that a column belongs to.
    pub fn panel_of(self, column: usize) -> StoredPanel {
        let start = column / PANEL_COLUMNS * PANEL_COLUMNS;
        let columns = PANEL_COLUMNS.min(self.columns - start);
        StoredPanel { range: start * self.rows..(start + columns) * self.rows, start, columns }
    }

    /// All panels, from left to right.
    pub fn panels(self) -> impl Iterator<Item = StoredPanel> {
        (0..self.columns).step_by(PANEL_COLUMNS).map(move |column| self.panel_of(column))
    }

    /// The matrix row by row.
    ///
    /// # Panics
    /// When `stored` is shorter than the matrix.
    pub fn to_rows(self, stored: &[f32]) -> Vec<f32> {
        let mut rows = vec![0.0; self.elements()];
        for StoredPanel { range, start, columns } in self.panels() {
            let places = rows.chunks_exact_mut(self.columns).map(|row| &mut row[start..start + columns]);
            places.zip(stored[range].chunks_exact(columns)).for_each(|(place, values)| place.copy_from_slice(values));
        }
        rows
    }

    /// Stores a matrix that is given row by row.
    ///
    /// # Panics
    /// When a slice has another number of elements than the matrix.
    pub fn store(self, rows: &[f32], stored: &mut [f32]) {
        assert_eq!([rows.len(), stored.len()], [self.elements(); 2], "elements of the matrix");
        for (row, values) in rows.chunks_exact(self.columns).enumerate() {
            self.store_row(row, values, stored);
        }
    }

    /// Stores one row of a matrix.
    ///
    /// # Panics
    /// When a slice is shorter than a row, or than the matrix.
    pub fn store_row(self, row: usize, values: &[f32], stored: &mut [f32]) {
        for StoredPanel { range, start, columns } in self.panels() {
            stored[range][row * columns..][..columns].copy_from_slice(&values[start..][..columns]);
        }
    }

    /// Where an element lies.
    pub fn place(self, row: usize, column: usize) -> usize {
        let StoredPanel { range, start, columns } = self.panel_of(column);
        range.start + row * columns + column - start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_lie_one_after_the_other_and_each_row_by_row() {
        for columns in [1, 63, 64, 65, 130] {
            let matrix = PanelMatrix { rows: 3, columns };
            let mut in_order = Vec::new();
            for panel in matrix.panels() {
                assert_eq!(panel.range.start, in_order.len());
                for row in 0..matrix.rows {
                    in_order.extend((panel.start..panel.start + panel.columns).map(|column| (row, column)));
                }
                assert_eq!(panel.range.end, in_order.len());
            }
            assert_eq!(in_order.len(), matrix.elements());
            for (place, (row, column)) in in_order.into_iter().enumerate() {
                assert_eq!(matrix.place(row, column), place, "row {row}, column {column} of {columns}");
            }
            let rows: Vec<f32> = (0..matrix.elements()).map(|element| element as f32).collect();
            let mut stored = vec![0.0; rows.len()];
            matrix.store(&rows, &mut stored);
            assert!((0..rows.len()).all(|i| stored[matrix.place(i / columns, i % columns)] == rows[i]));
            assert_eq!(matrix.to_rows(&stored), rows);
        }
    }
}
