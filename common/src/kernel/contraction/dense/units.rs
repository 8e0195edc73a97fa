//! How a product is divided into units of work.

use std::ops::Range;

/// Units for each thread, so that one that is disturbed does not hold up the others for long.
const UNITS_PER_THREAD: usize = 24;

/// Elements of copied columns that are gone through for one panel after the other: 512 KiB, so that they stay in the L2
/// cache beside the panel.
const BAND: usize = 128 << 10;
/// Fewer rows than this are not worth copying a panel.
const MIN_BAND_ROWS: usize = 192;

/// Units of work in the order in which they are best done: band by band of the rows, panel by panel, stretch by stretch
/// of the band's rows.
#[derive(Clone, Copy)]
pub(super) struct Units {
    rows: usize,
    bands: usize,
    band_rows: usize,
    panels: usize,
    /// Units of a band and panel.
    pub(super) stretches: usize,
    unit_rows: usize,
}

/// Some rows of a panel.
pub(super) struct Unit {
    pub(super) panel: usize,
    /// Its place among the units of the same band and panel.
    pub(super) stretch: usize,
    /// May be empty.
    pub(super) rows: Range<usize>,
}

impl Units {
    /// Units of `rows` rows by `panels` panels for some threads: whole groups of rows. Of columns that are copied, so
    /// `deep`, a band is gone through at a time.
    pub(super) fn new([rows, panels]: [usize; 2], deep: Option<usize>, group: usize, threads: usize) -> Self {
        let bands = deep.map_or(1, |depth| rows.div_ceil((BAND / depth.max(1)).max(MIN_BAND_ROWS)));
        let band_rows = rows.div_ceil(bands).next_multiple_of(group);
        let wanted = if threads == 1 { 1 } else { (threads * UNITS_PER_THREAD).div_ceil(panels * bands) };
        let unit_rows = band_rows.div_ceil(wanted).next_multiple_of(group);
        Self { rows, bands, band_rows, panels, stretches: band_rows.div_ceil(unit_rows), unit_rows }
    }

    pub(super) fn count(&self) -> usize {
        self.bands * self.panels * self.stretches
    }

    pub(super) fn get(&self, unit: usize) -> Unit {
        let (place, stretch) = (unit / self.stretches, unit % self.stretches);
        let (band, panel) = (place / self.panels, place % self.panels);
        let end = self.rows.min((band + 1) * self.band_rows);
        let start = (band * self.band_rows + stretch * self.unit_rows).min(end);
        Unit { panel, stretch, rows: start..end.min(start + self.unit_rows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: products of any shape, for any number of threads, in bands or not. Property: each row of each panel belongs
    /// to one unit.
    #[test]
    fn units_cover_every_row_of_every_panel_once() {
        for (rows, panels) in [(1, 1), (2049, 16), (785, 32), (47, 3), (48, 3), (49, 2), (1000, 1)] {
            for deep in [None, Some(0), Some(1), Some(256), Some(1024), Some(1 << 20)] {
                for (threads, group) in [(1, 48), (2, 12), (7, 48)] {
                    let units = Units::new([rows, panels], deep, group, threads);
                    let mut times = vec![0; rows * panels];
                    for unit in 0..units.count() {
                        let Unit { panel, stretch, rows: range } = units.get(unit);
                        assert!(stretch < units.stretches);
                        range.for_each(|row| times[panel * rows + row] += 1);
                    }
                    assert!(times.iter().all(|&times| times == 1), "{rows} rows, {panels} panels, {deep:?}, {threads}");
                }
            }
        }
    }
}
