//! One matrix product whose work is shared by the threads of the pool.

use crate::kernel::contraction::crew::{Crew, Desk};
use crate::kernel::contraction::{After, Panel, SLACK, index, panels};
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{self, Block, Finish, Row, Run, Start};
use crate::kernel::precision::Precision;
use crate::kernel::products::Element;

/// Fewer products than this are not worth another thread: about 10 us of one core.
const MIN_SHARED_PRODUCTS: usize = 1 << 20;
/// Units for each thread, so that one that is disturbed does not hold up the others for long.
const UNITS_PER_THREAD: usize = 24;

/// Input columns that are copied together for a weight gradient, so that they lie side by side for each sample: a
/// multiple of the rows of the microkernel's largest tiles (6 and 8), in whole cache lines.
pub(super) const GROUP: usize = 48;

/// How the scratch memory of a desk is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeskLayout {
    /// Elements at its beginning for a panel of the second operand. Groups of columns of the first one lie behind it.
    pub(super) panel_len: usize,
    /// Rows for which there is room in a group.
    pub(super) max_rows: usize,
}

/// Which outputs a product has, and where their operands begin.
#[derive(Debug)]
pub(super) struct Product {
    isa: Isa,
    rows: Vec<Row>,
    panels: Vec<Panel>,
    desk: DeskLayout,
}

impl Product {
    /// `rows` rows by `columns` columns. The operand of row `i` begins at `a(i)`.
    pub(super) fn new(isa: Isa, [rows, columns]: [usize; 2], desk: DeskLayout, a: impl Fn(usize) -> usize) -> Self {
        let row = |i: usize| Row { a: index(a(i)), c: index(i * columns) };
        Self { isa, rows: (0..rows).map(row).collect(), panels: panels(isa, columns, 0), desk }
    }

    /// Computes the product in units of a panel by some rows. `pack` writes a panel of the second operand, `depth` rows
    /// as wide as the panel.
    pub(super) fn multiply<E: Element>(
        &self,
        sums: Sums<'_>,
        first: First<'_, E>,
        pack: &(dyn Fn(&Panel, &mut [E]) + Sync),
        output: &mut [f32],
        crew: &mut Crew,
    ) {
        let Sums { rows, depth, run_depth, segments, nodes, a_step, bias, accumulate, after } = sums;
        let (rows, columns) = (&self.rows[..rows], self.panels.iter().map(|panel| panel.columns).sum::<usize>());
        let Some(last) = rows.last() else { return };
        let operand_len = last.a as usize + depth.saturating_sub(1) * a_step + 1;
        assert!(first.holds(operand_len), "first operand too short");
        assert!(output.len() >= last.c as usize + columns, "output too short");
        assert_eq!(segments.iter().sum::<usize>() * run_depth, depth, "segments make up the depth");
        if let After::Gate(gate) = after {
            assert!(gate.len() >= last.c as usize + columns, "gate too short");
        }
        let runs = [Run { a: 0, b: 0, depth: index(run_depth) }];
        let unit_rows = unit_rows(rows.len(), self.panels.len(), crew.size());
        let stretches = rows.len().div_ceil(unit_rows);
        let output = Output(output.as_mut_ptr());
        let worth_sharing = rows.len() * depth * columns >= MIN_SHARED_PRODUCTS;
        crew.share(self.panels.len() * stretches, worth_sharing, |unit, desk| {
            let (panel_index, stretch) = (unit / stretches, unit % stretches * unit_rows);
            let panel = &self.panels[panel_index];
            let rows = &rows[stretch..rows.len().min(stretch + unit_rows)];
            let Desk { scratch, panel: at_hand, groups } = desk;
            let scratch: &mut [E] = bytemuck::cast_slice_mut(scratch);
            let (packed, grouped) = scratch.split_at_mut(self.desk.panel_len);
            let packed = &mut packed[..depth * panel.width];
            if at_hand.replace(panel_index) != Some(panel_index) {
                pack(panel, packed);
            }
            let a = match first {
                First::Rows(operand) => operand,
                First::Columns(copy) => {
                    for group in stretch / GROUP..(stretch + rows.len()).div_ceil(GROUP) {
                        if !std::mem::replace(&mut groups[group], true) {
                            copy(group, &mut grouped[group * GROUP * self.desk.max_rows..]);
                        }
                    }
                    assert!(grouped.len() >= operand_len, "desk of the plan");
                    grouped
                }
            };
            let block = Block {
                a: a.as_ptr(),
                b: packed.as_ptr(),
                c: output.column(panel.start),
                rows,
                runs: &runs,
                segments,
                a_repeat: run_depth * a_step,
                b_repeat: run_depth,
                a_step,
                b_stride: panel.width,
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
                nodes,
            };
            debug_assert!(panel.width <= SLACK);
            // SAFETY: the lengths of `a`, `output` and the gate were checked above for the last row, and rows ascend;
            // the segments go through `depth` rows of the packed panel, which are whole vectors wide; units are
            // different panels or different rows, so that no two of them share an output.
            unsafe { microkernel::run(self.isa, &block) }
        });
    }
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

/// Rows of a unit of work, so that there are enough units for all threads to be done at the same time.
fn unit_rows(rows: usize, panels: usize, threads: usize) -> usize {
    if threads == 1 {
        return rows;
    }
    let units = (threads * UNITS_PER_THREAD).div_ceil(panels);
    rows.div_ceil(units).next_multiple_of(GROUP)
}

/// An output to which several threads write, each to places of its own.
#[derive(Clone, Copy)]
struct Output(*mut f32);

// SAFETY: an address may be known to any thread. Who writes through it says why nobody else does.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// The output from a column on.
    fn column(self, column: usize) -> *mut f32 {
        self.0.wrapping_add(column)
    }
}
