//! Weight gradients: every weight sums over samples and pixels.
//!
//! Operands are gone through many times: the high one for each panel of low channels, the low one for each tile of high
//! channels. Where there are many panels, both are copied together first, so that what a few tiles read is one stretch and
//! stays in the L1 cache. Else they are read where they lie.

use std::collections::BTreeMap;

use super::lines::{Line, Lines};
use super::{ChannelCounts, Panel, PixelRelation, SLACK, goes_on, index, panels, pixels};
use crate::kernel::elementwise;
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{self, Block, Finish, Row, Run, Start, panel_width, panel_widths};
use crate::kernel::products::ChainElement;

/// Panels from which on copies of the high operand pay: each element is copied once and read for all of them.
const MIN_PANELS: usize = 4;
/// High channels that are copied together: a cache line of each pixel.
const TOGETHER: usize = 16;
/// Pixels that are copied together: with as many rows of a panel, they fill the L1 cache.
const MAX_DEPTH: usize = 256;

/// Weights whose taps connect the same rectangle of low pixels.
#[derive(Debug)]
struct ReduceGroup {
    rows: Vec<Row>,
    /// Of one sample.
    runs: Vec<Run>,
    /// Low pixels of the rectangle.
    pixels: usize,
    /// The runs as pixels of the two images, to be copied.
    high_lines: Lines,
    low_lines: Lines,
}

/// A plan for weight gradients; see the module's documentation.
#[derive(Debug)]
pub struct Reduce {
    isa: Isa,
    groups: Vec<ReduceGroup>,
    /// Of the low channels.
    panels: Vec<Panel>,
    channels: ChannelCounts,
    taps: usize,
    a_step: usize,
    high_len: usize,
    low_pixels: usize,
    /// Whether some tap connects no pixels at all: no row computes its gradient, which is 0.
    has_dead_taps: bool,
}

impl Reduce {
    /// A plan for any number of samples.
    pub fn new(isa: Isa, relation: &PixelRelation, channels: ChannelCounts) -> Self {
        let low_columns = relation.low.columns;
        let mut by_rectangle: BTreeMap<Rectangle, Vec<usize>> = BTreeMap::new();
        let mut rectangles: Vec<Option<Rectangle>> = vec![None; relation.taps()];
        relation.for_each(|_, low, tap| {
            let (y, x) = (low / low_columns, low % low_columns);
            rectangles[tap] = Some(Rectangle::around(rectangles[tap], y, x));
        });
        let has_dead_taps = rectangles.contains(&None);
        for (tap, rectangle) in rectangles.into_iter().enumerate() {
            if let Some(rectangle) = rectangle {
                by_rectangle.entry(rectangle).or_default().push(tap);
            }
        }
        let high_len = pixels(relation.high) * channels.high;
        let plan = Self {
            isa,
            groups: by_rectangle.iter().map(|(r, taps)| reduce_group(relation, channels, *r, taps)).collect(),
            panels: panels(isa, channels.low, 0),
            channels,
            taps: relation.taps(),
            a_step: relation.strides.columns * channels.high,
            high_len,
            low_pixels: pixels(relation.low),
            has_dead_taps,
        };
        for group in &plan.groups {
            for (row, run) in group.rows.iter().flat_map(|row| group.runs.iter().map(move |run| (row, run))) {
                let first = row.a as isize + run.a as isize;
                let last = first + ((run.depth - 1) as usize * plan.a_step) as isize;
                assert!(first >= 0 && (last as usize) < high_len, "a plan stays inside the high image");
                assert!((run.b + run.depth) as usize <= plan.low_pixels, "a plan stays inside the low image");
            }
        }
        plan
    }

    /// Elements of scratch memory that a run over `samples` samples needs.
    pub fn scratch_len(&self, samples: usize) -> usize {
        let pixels = samples * self.low_pixels;
        if self.copies_both() {
            let width = self.panels.iter().map(|panel| panel.width).sum::<usize>() + TOGETHER;
            pixels.min(MAX_DEPTH.max(self.low_pixels)) * width
        } else if self.packs_low() {
            pixels * panel_widths(self.isa)[0]
        } else {
            0
        }
    }

    /// Whether both operands are copied together first: see the module's documentation.
    fn copies_both(&self) -> bool {
        self.panels.len() >= MIN_PANELS && self.channels.high >= TOGETHER
    }

    /// Whether columns of the low operand are copied together first: far-apart rows would collide in the L1 cache.
    fn packs_low(&self) -> bool {
        self.channels.low > panel_widths(self.isa)[0]
    }

    /// Adds to `gradient` (taps, high channels, low channels) the sum over samples, low rows and low columns of
    /// `high * low`, or sets it to that sum. `high` is (samples, high pixels, high channels), `low` (samples, low
    /// pixels, low channels) followed by at least [`SLACK`] more elements. With pairs, a sample is a pair of samples.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn run<E: ChainElement>(&self, samples: usize, operands: ReduceOperands<'_, E>) {
        let ReduceOperands { high, low, gradient, accumulate, scratch } = operands;
        let channels = self.channels;
        assert!(high.len() >= samples * self.high_len, "high operand too short");
        assert!(low.len() >= samples * self.low_pixels * channels.low + SLACK, "low operand too short, or no slack");
        assert_eq!(gradient.len(), self.taps * channels.high * channels.low, "gradient of the plan");
        if !accumulate && (self.has_dead_taps || samples == 0) {
            gradient.fill(0.0);
        }
        if samples == 0 {
            return;
        }
        if self.copies_both() {
            let operands = ReduceOperands { high, low, gradient, accumulate, scratch };
            return self.run_on_copies(samples, operands);
        }
        for panel in &self.panels {
            let (b, b_stride) = if self.packs_low() {
                let rows = samples * self.low_pixels;
                let packed = &mut scratch[..rows * panel.width];
                let (from, to) = (bytemuck::cast_slice(low), bytemuck::cast_slice_mut(packed));
                elementwise::copy_columns(self.isa, from, channels.low, panel.start, panel.columns, to, panel.width);
                (packed.as_ptr(), panel.width)
            } else {
                (low[panel.start..].as_ptr(), channels.low)
            };
            for group in &self.groups {
                let block = Block {
                    a: high.as_ptr(),
                    b,
                    c: gradient[panel.start..].as_mut_ptr(),
                    rows: &group.rows,
                    runs: &group.runs,
                    segments: &[samples],
                    a_repeat: self.high_len,
                    b_repeat: self.low_pixels,
                    a_step: self.a_step,
                    b_stride,
                    columns: panel.columns,
                    start: if accumulate { Start::Accumulate } else { Start::Zero },
                    finish: Finish::Keep,
                    rounded_on: None,
                    ahead: None,
                };
                debug_assert!(panel_width(self.isa, panel.columns) <= SLACK);
                // SAFETY: rows and runs were checked against one sample's sizes when the plan was made, and the lengths
                // above are those of `samples` samples; whole vectors of `low` end within the slack (or within the
                // packed copy, whose rows are whole vectors); rows and panels of `gradient` do not overlap.
                unsafe { microkernel::run(self.isa, &block) };
            }
        }
    }

    /// [`Reduce::run`] where [`Reduce::copies_both`].
    fn run_on_copies<E: ChainElement>(&self, samples: usize, operands: ReduceOperands<'_, E>) {
        let ReduceOperands { high, low, gradient, accumulate, scratch } = operands;
        let low_len = self.low_pixels * self.channels.low;
        for group in &self.groups {
            let at_once = (MAX_DEPTH / group.pixels).clamp(1, samples);
            for first in (0..samples).step_by(at_once) {
                let some = at_once.min(samples - first);
                let depth = some * group.pixels;
                let (high, low) = (&high[first * self.high_len..], &low[first * low_len..]);
                let (lines, panels) = scratch.split_at_mut(depth * TOGETHER);
                let mut rest = &mut *panels;
                for panel in &self.panels {
                    let (to, behind) = rest.split_at_mut(depth * panel.width);
                    group.low_lines.copy(self.isa, (low, panel.start), panel.columns, (to, panel.width));
                    rest = behind;
                }
                let start = if accumulate || first > 0 { Start::Accumulate } else { Start::Zero };
                for rows in group.rows.chunks(self.channels.high).flat_map(|of_tap| of_tap.chunks(TOGETHER)) {
                    group.high_lines.copy(self.isa, (high, rows[0].a as usize), rows.len(), (&mut *lines, TOGETHER));
                    self.add_copies(rows, depth, start, (lines, panels), gradient);
                }
            }
        }
    }

    /// Adds up `depth` products for some rows of the gradient, from copies.
    fn add_copies<E: ChainElement>(
        &self,
        rows: &[Row],
        depth: usize,
        start: Start,
        (lines, panels): (&[E], &[E]),
        gradient: &mut [f32],
    ) {
        let mut copied = [Row { a: 0, c: 0 }; TOGETHER];
        let copied = &mut copied[..rows.len()];
        (0..).zip(copied.iter_mut()).zip(rows).for_each(|((a, to), row)| *to = Row { a, c: row.c });
        let runs = [Run { a: 0, b: 0, depth: index(depth), line: Run::WHOLE }];
        let mut rest = panels;
        for panel in &self.panels {
            let (b, behind) = rest.split_at(depth * panel.width);
            rest = behind;
            let block = Block {
                a: lines.as_ptr(),
                b: b.as_ptr(),
                c: gradient[panel.start..].as_mut_ptr(),
                rows: copied,
                runs: &runs,
                segments: &[1],
                a_repeat: depth * TOGETHER,
                b_repeat: depth,
                a_step: TOGETHER,
                b_stride: panel.width,
                columns: panel.columns,
                start,
                finish: Finish::Keep,
                rounded_on: None,
                ahead: None,
            };
            // SAFETY: `lines` are `depth` rows of `TOGETHER` elements, the panel is as many rows of whole vectors; rows and
            // panels of `gradient` do not overlap, and its length was checked.
            unsafe { microkernel::run(self.isa, &block) };
        }
    }
}

/// What a [`Reduce`] reads and writes; see [`Reduce::run`].
pub struct ReduceOperands<'a, E = f32> {
    /// (samples, high pixels, high channels)
    pub high: &'a [E],
    /// (samples, low pixels, low channels), then [`SLACK`].
    pub low: &'a [E],
    /// (taps, high channels, low channels)
    pub gradient: &'a mut [f32],
    /// Whether `gradient` is added to or overwritten.
    pub accumulate: bool,
    /// At least [`Reduce::scratch_len`] elements.
    pub scratch: &'a mut [E],
}

/// A rectangle of low pixels: rows and columns, ends excluded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rectangle {
    top: usize,
    bottom: usize,
    left: usize,
    right: usize,
}

impl Rectangle {
    fn around(known: Option<Self>, y: usize, x: usize) -> Self {
        let one = Self { top: y, bottom: y + 1, left: x, right: x + 1 };
        known.map_or(one, |r| Self {
            top: r.top.min(y),
            bottom: r.bottom.max(y + 1),
            left: r.left.min(x),
            right: r.right.max(x + 1),
        })
    }
}

fn reduce_group(relation: &PixelRelation, channels: ChannelCounts, area: Rectangle, taps: &[usize]) -> ReduceGroup {
    let (width, columns) = (relation.high.columns, relation.kernel.columns);
    let rows = taps.iter().flat_map(|&tap| {
        let place = (tap / columns * width + tap % columns) * channels.high;
        (0..channels.high).map(move |channel| Row {
            a: index(place + channel),
            c: index((tap * channels.high + channel) * channels.low),
        })
    });
    let mut runs: Vec<Run> = Vec::new();
    for y in area.top..area.bottom {
        let high_y = (y * relation.strides.rows) as isize - relation.padding.rows as isize;
        let high_x = (area.left * relation.strides.columns) as isize - relation.padding.columns as isize;
        let a = (high_y * width as isize + high_x) * channels.high as isize;
        let run = Run {
            a: i32::try_from(a).expect("offsets within a sample fit 32 bits"),
            b: index(y * relation.low.columns + area.left),
            depth: index(area.right - area.left),
            line: Run::WHOLE,
        };
        match runs.last_mut().filter(|last| goes_on(last, &run, relation.strides.columns * channels.high)) {
            Some(last) => last.depth += run.depth,
            None => runs.push(run),
        }
    }
    let (a_step, high_len) = (relation.strides.columns * channels.high, pixels(relation.high) * channels.high);
    let low_len = pixels(relation.low) * channels.low;
    let high = runs.iter().map(|run| Line { start: run.a as isize, pixels: run.depth as usize });
    let low =
        runs.iter().map(|run| Line { start: (run.b as usize * channels.low) as isize, pixels: run.depth as usize });
    ReduceGroup {
        rows: rows.collect(),
        pixels: (area.bottom - area.top) * (area.right - area.left),
        high_lines: Lines::new(high, a_step, high_len),
        low_lines: Lines::new(low, channels.low, low_len),
        runs,
    }
}
