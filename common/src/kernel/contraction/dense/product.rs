//! One matrix product whose work is shared by the threads of the pool.

use std::sync::atomic::{AtomicBool, Ordering};

use super::output::{Output, OutputPart, Spacing};
use super::units::{Unit, Units};
use crate::kernel::ahead::Ahead;
use crate::kernel::contraction::crew::{Crew, Desk};
use crate::kernel::contraction::{After, Panel, SLACK, index, panels};
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{self, Block, Finish, Row, Run, Start};
use crate::kernel::precision::Precision;
use crate::kernel::products::Element;
use crate::model::{PANEL_COLUMNS, PanelMatrix};

/// Fewer products than this are not worth another thread: about 10 us of one core.
const MIN_SHARED_PRODUCTS: usize = 1 << 20;

/// Whether so many products are worth more than one thread.
pub(super) fn is_worth_sharing(products: usize) -> bool {
    products >= MIN_SHARED_PRODUCTS
}

/// How the scratch memory of a desk is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeskLayout {
    /// Elements at its beginning for a panel of the second operand. Groups of columns of the first one lie behind it.
    pub(super) panel_len: usize,
    /// Input columns of a group: see [`microkernel::group_columns`].
    pub(super) group: usize,
    /// Rows for which there is room in a group.
    pub(super) max_rows: usize,
}

/// Which outputs a product has, and where their operands begin.
#[derive(Debug)]
pub(super) struct Product {
    isa: Isa,
    /// Rows of whole panels, and of the last one if it is narrower, where outputs lie in panels.
    rows: [Vec<Row>; 2],
    panels: Vec<Panel>,
    columns: usize,
    desk: DeskLayout,
}

impl Product {
    /// `rows` rows by `columns` columns, row by row. The operand of row `i` begins at `a(i)`.
    pub(super) fn to_rows(isa: Isa, [rows, columns]: [usize; 2], desk: DeskLayout, a: impl Fn(usize) -> usize) -> Self {
        Self { isa, rows: [rows_of(rows, columns, a), Vec::new()], panels: panels(isa, columns, 0), columns, desk }
    }

    /// As many outputs as the matrix has, and a row more, in panels: see [`Output::Panels`].
    pub(super) fn to_panels(isa: Isa, matrix: PanelMatrix, desk: DeskLayout, a: impl Fn(usize) -> usize) -> Self {
        let (rows, columns) = (matrix.rows + 1, matrix.columns);
        let widths = [PANEL_COLUMNS.min(columns), columns % PANEL_COLUMNS];
        let rows = widths.map(|width| rows_of(rows, width, &a));
        Self { isa, rows, panels: panels(isa, columns, 0), columns, desk }
    }

    /// Computes the product in units of a panel by some rows. Returns whether all outputs are known to be finite.
    pub(super) fn multiply<E: Element>(
        &self,
        sums: Sums<'_>,
        first: First<'_, E>,
        second: Second<'_, E>,
        output: Output<'_>,
        crew: &mut Crew,
    ) -> bool {
        let Sums { rows: row_count, depth, run_depth, segments, nodes, a_step, bias, accumulate, after } = sums;
        let rows = self.rows.each_ref().map(|rows| &rows[..row_count.min(rows.len())]);
        let Some(last) = rows[0].last() else { return true };
        let operand_len = last.a as usize + depth.saturating_sub(1) * a_step + 1;
        assert!(first.holds(operand_len), "first operand too short");
        assert!(output.holds(row_count, self.columns), "output too short");
        assert_eq!(segments.iter().sum::<usize>() * run_depth, depth, "segments make up the depth");
        if let After::Gate(gate) = after {
            assert!(matches!(output, Output::Rows(_)), "gates lie row by row");
            assert!(gate.len() >= row_count * self.columns, "gate too short");
        }
        let runs = [Run { a: 0, b: 0, depth: index(run_depth), line: Run::WHOLE }];
        let in_bands = matches!(first, First::Columns(_));
        let units = Units::new([row_count, self.panels.len()], in_bands.then_some(depth), self.desk.group, crew.size());
        let output = output.places();
        let worth_sharing = is_worth_sharing(row_count * depth * self.columns);
        let known_finite = AtomicBool::new(true);
        crew.share(units.count(), worth_sharing, |unit, desk| {
            let Unit { panel: panel_index, stretch, rows: range } = units.get(unit);
            let panel = &self.panels[panel_index];
            let Desk { scratch, panel: at_hand, groups } = desk;
            let scratch: &mut [E] = bytemuck::cast_slice_mut(scratch);
            let (packed, grouped) = scratch.split_at_mut(self.desk.panel_len);
            let (b, b_stride) = match second.in_place(panel, depth) {
                Some(stored) => (stored, PANEL_COLUMNS),
                None => {
                    let packed = &mut packed[..depth * panel.width];
                    if at_hand.replace(panel_index) != Some(panel_index) {
                        (second.pack)(panel, packed);
                    }
                    (&*packed, panel.width)
                }
            };
            let a = match first {
                First::Rows(operand) => operand,
                First::Columns(copy) => {
                    let DeskLayout { group: size, max_rows, .. } = self.desk;
                    for group in range.start / size..range.end.div_ceil(size) {
                        if !std::mem::replace(&mut groups[group], true) {
                            copy(group, &mut grouped[group * size * max_rows..]);
                        }
                    }
                    assert!(grouped.len() >= operand_len, "desk of the plan");
                    grouped
                }
            };
            let next_panel = self.panels.get(panel_index + 1).and_then(second.source);
            let next_share = next_panel.map(|source| source.part(stretch, units.stretches));
            for OutputPart { rows: part, spacing, c, ahead } in output.parts(panel, range) {
                let alone = [Row { c: 0, ..rows[0][part.start] }];
                let rows = match spacing {
                    Spacing::Wide => &rows[0][part],
                    Spacing::Narrow => &rows[1][part],
                    Spacing::Alone => &alone,
                };
                let block = Block {
                    a: a.as_ptr(),
                    b: b.as_ptr(),
                    c,
                    rows,
                    runs: &runs,
                    segments,
                    a_repeat: run_depth * a_step,
                    b_repeat: run_depth,
                    a_step,
                    b_stride,
                    columns: panel.columns,
                    start: match bias {
                        _ if accumulate => Start::Accumulate,
                        Some(bias) => Start::Bias(bias[panel.start..].as_ptr()),
                        None => Start::Zero,
                    },
                    finish: match after {
                        After::Keep => Finish::Keep,
                        After::Relu => Finish::Relu,
                        After::Gate(gate) => Finish::Gate(gate[panel.start..].as_ptr()),
                    },
                    rounded_on: (nodes == Precision::Bf16).then_some(self.isa),
                    ahead: ahead.or(next_share.clone()),
                };
                debug_assert!(panel.width <= SLACK);
                // SAFETY: the lengths of `a`, `output` and the gate were checked above for the last row, and rows
                // ascend; the segments go through `depth` rows of the panel, which are whole vectors wide; units are
                // different panels or different rows, so that no two of them share an output.
                let finite = unsafe { microkernel::run(self.isa, &block) };
                // Threads meet at the end of `share`.
                known_finite.fetch_and(finite, Ordering::Relaxed);
            }
        });
        known_finite.into_inner()
    }
}

/// Rows whose outputs are `width` apart.
fn rows_of(rows: usize, width: usize, a: impl Fn(usize) -> usize) -> Vec<Row> {
    (0..rows).map(|i| Row { a: index(a(i)), c: index(i * width) }).collect()
}

/// The first operand of a product.
#[derive(Clone, Copy)]
pub(super) enum First<'a, E> {
    /// It is read where it lies.
    Rows(&'a [E]),
    /// Groups of its columns are copied to the desks of those who need them.
    Columns(&'a (dyn Fn(usize, &mut [E]) + Sync)),
}

impl<E> First<'_, E> {
    /// Whether that many elements are there. A desk is checked when it is used.
    fn holds(&self, len: usize) -> bool {
        match self {
            Self::Rows(operand) => operand.len() >= len,
            Self::Columns(_) => true,
        }
    }
}

/// What a product sums, and how.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub(super) rows: usize,
    /// Products of one output.
    pub(super) depth: usize,
    /// Products of one repeat of a segment.
    pub(super) run_depth: usize,
    pub(super) segments: &'a [usize],
    /// What the sums of several segments are rounded to.
    pub(super) nodes: Precision,
    /// From one element of a row's operand to the next.
    pub(super) a_step: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) accumulate: bool,
    pub(super) after: After<'a>,
}

impl Sums<'_> {
    /// Each of `depth` products in one run, for `rows` rows.
    pub(super) fn in_one(rows: usize, depth: usize) -> Self {
        Self {
            rows,
            depth,
            run_depth: depth,
            segments: &[1],
            nodes: Precision::F32,
            a_step: 1,
            bias: None,
            accumulate: false,
            after: After::Keep,
        }
    }
}

/// The second operand of a product: `depth` rows by the output's columns.
#[derive(Clone, Copy)]
pub(super) struct Second<'a, E> {
    /// The operand, if it lies in panels.
    pub(super) stored: Option<&'a [E]>,
    /// Copies a panel together, in rows as wide as the panel.
    pub(super) pack: &'a (dyn Fn(&Panel, &mut [E]) + Sync),
    /// Where a panel comes from, if it is worth fetching while the one before it is at hand.
    pub(super) source: &'a (dyn Fn(&Panel) -> Option<Ahead> + Sync),
}

impl<'a, E> Second<'a, E> {
    /// An operand of which every panel is copied together.
    pub(super) fn copied(pack: &'a (dyn Fn(&Panel, &mut [E]) + Sync)) -> Self {
        Self { stored: None, pack, source: &|_| None }
    }

    /// The panel, where it can be read as it lies: it is a whole one.
    fn in_place(&self, panel: &Panel, depth: usize) -> Option<&'a [E]> {
        let stored = self.stored.filter(|_| panel.columns == PANEL_COLUMNS)?;
        Some(&stored[panel.start * depth..][..PANEL_COLUMNS * depth])
    }
}
