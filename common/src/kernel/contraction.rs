//! Convolutions, transposed convolutions and matrix products as plans for the microkernel.
//!
//! One relation covers them all: `high pixel = low pixel * stride + tap - padding`. A convolution computes the low image
//! from the high one, a transposed convolution the high from the low, a dense layer has one pixel and one tap. Weights
//! lie as `[tap][high channel][low channel]`, which is Keras' order for all three. So there are two kinds of plan:
//!
//! - [`Gather`]: each output pixel sums over the taps that reach it, tap by tap, channel by channel. It serves forward
//!   passes and input gradients in both directions.
//! - [`Reduce`]: each weight sums over samples and pixels, in that order. It serves all weight gradients.
//!
//! Plans are made once for a model and checked then; running one costs a few length checks.

use std::collections::BTreeMap;

use super::elementwise;
use super::isa::Isa;
use super::microkernel::{self, Block, Finish, Row, Run, Start, panel_width, panel_widths};
use crate::model::{self, Padding, Pair};

/// Floats that must follow the last element of a buffer that is read in whole vectors: the widest panel.
pub const SLACK: usize = 64;

/// Below this many output channels a [`Gather`] over several taps multiplies all taps' filters first and adds up after.
const NARROW: usize = 16;

/// How pixels of a larger image correspond to pixels of a smaller one: `high = low * strides + tap - padding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelRelation {
    /// Size of the image on the finer grid.
    pub high: Pair,
    /// Size of the image on the coarser grid.
    pub low: Pair,
    /// Size of the window of taps.
    pub kernel: Pair,
    /// Step of the window.
    pub strides: Pair,
    /// Rows and columns of the window that lie before the first pixel.
    pub padding: Pair,
}

impl PixelRelation {
    /// The relation of a matrix product on `pixels` independent positions.
    pub fn pointwise(pixels: usize) -> Self {
        let line = Pair { rows: 1, columns: pixels };
        Self { high: line, low: line, kernel: Pair::square(1), strides: Pair::square(1), padding: Pair::square(0) }
    }

    /// The relation of a layer with Keras' padding.
    pub fn with_padding(high: Pair, low: Pair, kernel: Pair, strides: Pair, padding: Padding) -> Self {
        Self { high, low, kernel, strides, padding: model::paddings_before(high, low, kernel, strides, padding) }
    }

    /// Number of taps.
    pub fn taps(&self) -> usize {
        self.kernel.rows * self.kernel.columns
    }

    /// Calls `visit(high pixel, low pixel, tap)` for every pair of pixels that a tap connects.
    pub fn for_each(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let inside = |low: usize, stride: usize, tap: usize, padding: usize, size: usize| {
            (low * stride + tap).checked_sub(padding).filter(|&high| high < size)
        };
        for y in 0..self.low.rows {
            for x in 0..self.low.columns {
                for tap_y in 0..self.kernel.rows {
                    let Some(high_y) = inside(y, self.strides.rows, tap_y, self.padding.rows, self.high.rows) else {
                        continue;
                    };
                    for tap_x in 0..self.kernel.columns {
                        let high_x = inside(x, self.strides.columns, tap_x, self.padding.columns, self.high.columns);
                        if let Some(high_x) = high_x {
                            let high = high_y * self.high.columns + high_x;
                            visit(high, y * self.low.columns + x, tap_y * self.kernel.columns + tap_x);
                        }
                    }
                }
            }
        }
    }

    /// Number of multiplications of one channel pair: connected pairs of pixels.
    pub fn pairs(&self) -> usize {
        let mut pairs = 0;
        self.for_each(|_, _, _| pairs += 1);
        pairs
    }
}

fn pixels(size: Pair) -> usize {
    size.rows * size.columns
}

/// Which image a [`Gather`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The low image from the high one: a convolution, or the input gradient of a transposed one.
    ToLow,
    /// The high image from the low one.
    ToHigh,
}

/// What a [`Gather`] does with its sums.
#[derive(Clone, Copy, Debug)]
pub enum After<'a> {
    /// Nothing.
    Keep,
    /// `max(x, 0)`
    Relu,
    /// Sets it to 0 where the given buffer, laid out like the output, is not above 0: the backward pass of a relu.
    Gate(&'a [f32]),
}

/// A part of the output columns and its packed weights.
#[derive(Clone, Copy, Debug)]
struct Panel {
    start: usize,
    columns: usize,
    width: usize,
    /// Where its weights lie in the packed buffer.
    offset: usize,
}

/// Output pixels that are reached by the same taps.
#[derive(Debug)]
struct Group {
    /// For the largest number of samples, sample by sample; a prefix serves fewer.
    rows: Vec<Row>,
    rows_per_sample: usize,
    runs: Vec<Run>,
}

#[derive(Debug)]
enum Strategy {
    /// Sums stay in registers over all taps and channels.
    Direct(Vec<Group>),
    /// For few output channels: a matrix product with the filters of all taps, then a sum over taps for each output.
    TapByTap {
        group: Group,
        /// For each output pixel, the offsets of its terms in a sample's products, in the order of the taps.
        terms: Vec<Vec<u32>>,
    },
}

/// A plan for forward passes and input gradients; see the module's documentation.
#[derive(Debug)]
pub struct Gather {
    isa: Isa,
    direction: Direction,
    strategy: Strategy,
    panels: Vec<Panel>,
    taps: usize,
    channels_in: usize,
    channels_out: usize,
    input_pixels: usize,
    output_pixels: usize,
    max_samples: usize,
}

impl Gather {
    /// A plan for up to `max_samples` samples at a time.
    pub fn new(
        isa: Isa,
        relation: &PixelRelation,
        direction: Direction,
        channels: ChannelCounts,
        max_samples: usize,
    ) -> Self {
        let (input, output) = match direction {
            Direction::ToLow => (relation.high, relation.low),
            Direction::ToHigh => (relation.low, relation.high),
        };
        let (input_pixels, output_pixels) = (pixels(input), pixels(output));
        let (channels_in, channels_out) = match direction {
            Direction::ToLow => (channels.high, channels.low),
            Direction::ToHigh => (channels.low, channels.high),
        };
        // Which (tap, input pixel) pairs each output pixel sums over, in the order of the taps.
        let mut sources: Vec<Vec<(usize, usize)>> = vec![Vec::new(); output_pixels];
        relation.for_each(|high, low, tap| match direction {
            Direction::ToLow => sources[low].push((tap, high)),
            Direction::ToHigh => sources[high].push((tap, low)),
        });
        sources.iter_mut().for_each(|taps| taps.sort_unstable());

        let taps = relation.taps();
        let sizes = Sizes { channels_in, channels_out, input_pixels, output_pixels, max_samples };
        let tap_by_tap = channels_out < NARROW && taps > 1 && channels_in >= NARROW;
        let (strategy, columns, depth) = if tap_by_tap {
            (tap_by_tap_strategy(&sources, taps, &sizes), taps * channels_out, channels_in)
        } else {
            (Strategy::Direct(direct_groups(&sources, &sizes)), channels_out, taps * channels_in)
        };
        let panels = panels(isa, columns, depth);
        Self {
            isa,
            direction,
            strategy,
            panels,
            taps,
            channels_in,
            channels_out,
            input_pixels,
            output_pixels,
            max_samples,
        }
    }

    /// Floats of a packed copy of the weights.
    pub fn packed_len(&self) -> usize {
        self.panels.iter().map(|panel| panel.width).sum::<usize>() * self.depth()
    }

    /// Floats of scratch memory that a run needs.
    pub fn scratch_len(&self) -> usize {
        match self.strategy {
            Strategy::Direct(_) => 0,
            Strategy::TapByTap { .. } => self.max_samples * self.input_pixels * self.taps * self.channels_out,
        }
    }

    /// Products summed for a column of a panel.
    fn depth(&self) -> usize {
        match self.strategy {
            Strategy::Direct(_) => self.taps * self.channels_in,
            Strategy::TapByTap { .. } => self.channels_in,
        }
    }

    /// Copies `weights` (taps, high channels, low channels) into panels of columns, as [`Gather::run`] wants them.
    ///
    /// # Panics
    /// When a slice has not the length that the plan says.
    pub fn pack(&self, weights: &[f32], packed: &mut [f32]) {
        assert_eq!(weights.len(), self.taps * self.channels_in * self.channels_out, "weights of the plan");
        assert_eq!(packed.len(), self.packed_len(), "packed weights of the plan");
        match (&self.strategy, self.direction) {
            (Strategy::Direct(_), Direction::ToLow) => self.pack_rows(weights, packed),
            (Strategy::Direct(_), Direction::ToHigh) => self.pack_columns(weights, packed),
            (Strategy::TapByTap { .. }, direction) => self.pack_tap_by_tap(direction, weights, packed),
        }
    }

    /// The summed channels are the weights' rows: rows of a panel are stretches of rows of the weights.
    fn pack_rows(&self, weights: &[f32], packed: &mut [f32]) {
        for panel in &self.panels {
            let target = &mut packed[panel.offset..][..panel.width * self.depth()];
            for (row, from) in target.chunks_exact_mut(panel.width).zip(weights.chunks_exact(self.channels_out)) {
                row[..panel.columns].copy_from_slice(&from[panel.start..][..panel.columns]);
                row[panel.columns..].fill(0.0);
            }
        }
    }

    /// The summed channels are the weights' columns: every tap's matrix is transposed.
    fn pack_columns(&self, weights: &[f32], packed: &mut [f32]) {
        let (depth, size) = (self.channels_in, self.channels_in * self.channels_out);
        for panel in &self.panels {
            let target = &mut packed[panel.offset..][..panel.width * self.depth()];
            for (matrix, tap) in target.chunks_exact_mut(panel.width * depth).zip(weights.chunks_exact(size)) {
                let rows = &tap[panel.start * depth..][..panel.columns * depth];
                elementwise::transpose(self.isa, rows, depth, matrix, panel.width);
            }
        }
    }

    /// Column `tap * channels_out + channel` of the product is that tap's filter for that channel.
    fn pack_tap_by_tap(&self, direction: Direction, weights: &[f32], packed: &mut [f32]) {
        let (depth, channels) = (self.channels_in, self.channels_out);
        for panel in &self.panels {
            let target = &mut packed[panel.offset..][..panel.width * depth];
            for (k, row) in target.chunks_exact_mut(panel.width).enumerate() {
                row[panel.columns..].fill(0.0);
                for (j, value) in row[..panel.columns].iter_mut().enumerate() {
                    let (tap, channel) = ((panel.start + j) / channels, (panel.start + j) % channels);
                    *value = match direction {
                        Direction::ToLow => weights[(tap * depth + k) * channels + channel],
                        Direction::ToHigh => weights[(tap * channels + channel) * depth + k],
                    };
                }
            }
        }
    }

    /// Computes `output` (samples, output pixels, output channels) from `input` (samples, input pixels, input channels):
    /// bias, plus products tap by tap and channel by channel, then `after`. Buffers may be longer than needed.
    ///
    /// # Panics
    /// When `samples` exceeds the plan's largest number or a slice is too short.
    pub fn run(&self, samples: usize, operands: GatherOperands<'_>) {
        let GatherOperands { input, packed, bias, output, after, scratch } = operands;
        let outputs = samples * self.output_pixels * self.channels_out;
        assert!(samples <= self.max_samples, "{samples} samples in a plan for {}", self.max_samples);
        assert!(input.len() >= samples * self.input_pixels * self.channels_in, "input too short");
        assert!(output.len() >= outputs, "output too short");
        assert_eq!(packed.len(), self.packed_len(), "packed weights of the plan");
        assert!(bias.is_none_or(|bias| bias.len() == self.channels_out), "one bias for each output channel");
        if let After::Gate(gate) = after {
            assert!(gate.len() >= outputs, "gate too short");
        }
        if samples == 0 {
            return;
        }
        match &self.strategy {
            Strategy::Direct(groups) => {
                for panel in &self.panels {
                    for group in groups {
                        let block = Block {
                            a: input.as_ptr(),
                            b: packed[panel.offset..].as_ptr(),
                            c: output[panel.start..].as_mut_ptr(),
                            rows: &group.rows[..samples * group.rows_per_sample],
                            runs: &group.runs,
                            repeats: 1,
                            a_repeat: 0,
                            b_repeat: 0,
                            a_step: 1,
                            b_stride: panel.width,
                            columns: panel.columns,
                            start: bias.map_or(Start::Zero, |bias| Start::Bias(bias[panel.start..].as_ptr())),
                            finish: match after {
                                After::Keep => Finish::Keep,
                                After::Relu => Finish::Relu,
                                After::Gate(gate) => Finish::Gate(gate[panel.start..].as_ptr()),
                            },
                        };
                        // SAFETY: rows and runs were checked against one sample's sizes when the plan was made, and
                        // the lengths above are those of `samples` samples; packed panels are whole vectors wide and
                        // `depth` rows long; `output` is borrowed mutably, and panels and rows do not overlap.
                        unsafe { microkernel::run(self.isa, &block) }
                    }
                }
            }
            Strategy::TapByTap { group, terms } => {
                let columns = self.taps * self.channels_out;
                let used = samples * self.input_pixels * columns;
                assert!(scratch.len() >= used, "scratch memory too short");
                for panel in &self.panels {
                    let block = Block {
                        a: input.as_ptr(),
                        b: packed[panel.offset..].as_ptr(),
                        c: scratch[panel.start..].as_mut_ptr(),
                        rows: &group.rows[..samples * group.rows_per_sample],
                        runs: &group.runs,
                        repeats: 1,
                        a_repeat: 0,
                        b_repeat: 0,
                        a_step: 1,
                        b_stride: panel.width,
                        columns: panel.columns,
                        start: Start::Zero,
                        finish: Finish::Keep,
                    };
                    // SAFETY: as above, with `scratch` as the output.
                    unsafe { microkernel::run(self.isa, &block) }
                }
                let per_sample = self.input_pixels * columns;
                let sizes = (self.channels_out, self.output_pixels * self.channels_out);
                let products = scratch[..used].chunks_exact(per_sample);
                for (i, (products, output)) in products.zip(output.chunks_exact_mut(sizes.1)).enumerate() {
                    let after = match after {
                        After::Gate(gate) => After::Gate(&gate[i * sizes.1..][..sizes.1]),
                        other => other,
                    };
                    elementwise::sum_terms(self.isa, products, terms, bias, after, output, sizes.0);
                }
            }
        }
    }
}

/// What a [`Gather`] reads and writes; see [`Gather::run`].
pub struct GatherOperands<'a> {
    /// (samples, input pixels, input channels)
    pub input: &'a [f32],
    /// From [`Gather::pack`].
    pub packed: &'a [f32],
    /// One for each output channel.
    pub bias: Option<&'a [f32]>,
    /// (samples, output pixels, output channels)
    pub output: &'a mut [f32],
    /// Applied to every sum.
    pub after: After<'a>,
    /// At least [`Gather::scratch_len`] floats.
    pub scratch: &'a mut [f32],
}

/// Channels of the two images of a [`PixelRelation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelCounts {
    /// Of the high image.
    pub high: usize,
    /// Of the low image.
    pub low: usize,
}

struct Sizes {
    channels_in: usize,
    channels_out: usize,
    input_pixels: usize,
    output_pixels: usize,
    max_samples: usize,
}

/// Cuts `columns` into panels of the instruction set's widths; each takes `depth` rows of the packed buffer.
fn panels(isa: Isa, columns: usize, depth: usize) -> Vec<Panel> {
    let mut panels = Vec::new();
    let (mut start, mut offset) = (0, 0);
    while start < columns {
        let rest = columns - start;
        let widths = panel_widths(isa);
        let width = widths.iter().copied().find(|&width| width <= rest).unwrap_or(widths[widths.len() - 1]);
        let columns = rest.min(width);
        panels.push(Panel { start, columns, width, offset });
        start += columns;
        offset += width * depth;
    }
    panels
}

fn index(value: usize) -> u32 {
    u32::try_from(value).expect("tensors have at most 2^28 elements a sample, and plans few samples")
}

/// Groups output pixels by the taps that reach them and the relative places those taps read.
fn direct_groups(sources: &[Vec<(usize, usize)>], sizes: &Sizes) -> Vec<Group> {
    let mut by_taps: BTreeMap<Vec<(usize, isize)>, Vec<(usize, usize)>> = BTreeMap::new();
    for (output, taps) in sources.iter().enumerate() {
        let base = taps.first().map_or(0, |&(_, pixel)| pixel);
        let relative = taps.iter().map(|&(tap, pixel)| (tap, pixel as isize - base as isize)).collect();
        by_taps.entry(relative).or_default().push((base, output));
    }
    let groups = by_taps.into_iter().map(|(taps, places)| {
        let mut runs: Vec<Run> = Vec::new();
        for (tap, pixel) in taps {
            let a = i32::try_from(pixel * sizes.channels_in as isize).expect("offsets within a sample fit 32 bits");
            push_merged(&mut runs, Run { a, b: index(tap * sizes.channels_in), depth: index(sizes.channels_in) }, 1);
        }
        group(&places, runs, sizes.channels_out, sizes)
    });
    groups.collect()
}

/// Appends a run, or lengthens the last one if the new one goes on where it ends, in both operands.
fn push_merged(runs: &mut Vec<Run>, run: Run, a_step: usize) {
    match runs.last_mut() {
        Some(last) if last.a + (last.depth as usize * a_step) as i32 == run.a && last.b + last.depth == run.b => {
            last.depth += run.depth;
        }
        _ => runs.push(run),
    }
}

/// A group for outputs of `columns` floats at the given (input pixel, output pixel) places of every sample.
fn group(places: &[(usize, usize)], runs: Vec<Run>, columns: usize, sizes: &Sizes) -> Group {
    let (input, output) = (sizes.input_pixels * sizes.channels_in, sizes.output_pixels * columns);
    for run in &runs {
        for &(pixel, _) in places {
            let first = (pixel * sizes.channels_in) as isize + run.a as isize;
            assert!(first >= 0 && first as usize + run.depth as usize <= input, "a plan stays inside its input");
        }
    }
    let rows = (0..sizes.max_samples).flat_map(|sample| {
        places.iter().map(move |&(from, to)| Row {
            a: index(sample * input + from * sizes.channels_in),
            c: index(sample * output + to * columns),
        })
    });
    Group { rows: rows.collect(), rows_per_sample: places.len(), runs }
}

fn tap_by_tap_strategy(sources: &[Vec<(usize, usize)>], taps: usize, sizes: &Sizes) -> Strategy {
    let columns = taps * sizes.channels_out;
    let places: Vec<(usize, usize)> = (0..sizes.input_pixels).map(|pixel| (pixel, pixel)).collect();
    let run = Run { a: 0, b: 0, depth: index(sizes.channels_in) };
    let products = Sizes { output_pixels: sizes.input_pixels, ..*sizes };
    let terms = sources
        .iter()
        .map(|taps| taps.iter().map(|&(tap, pixel)| index(pixel * columns + tap * sizes.channels_out)).collect());
    Strategy::TapByTap { group: group(&places, vec![run], columns, &products), terms: terms.collect() }
}

/// Weights whose taps connect the same rectangle of low pixels.
#[derive(Debug)]
struct ReduceGroup {
    rows: Vec<Row>,
    /// Of one sample.
    runs: Vec<Run>,
}

/// A plan for weight gradients; see the module's documentation.
#[derive(Debug)]
pub struct Reduce {
    isa: Isa,
    groups: Vec<ReduceGroup>,
    channels: ChannelCounts,
    taps: usize,
    a_step: usize,
    high_len: usize,
    low_pixels: usize,
    /// Whether samples follow each other like pixels, so that a batch is one long run.
    pointwise: bool,
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
            channels,
            taps: relation.taps(),
            a_step: relation.strides.columns * channels.high,
            high_len,
            low_pixels: pixels(relation.low),
            pointwise: relation.taps() == 1 && relation.high == relation.low && relation.strides == Pair::square(1),
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

    /// Floats of scratch memory that a run over `samples` samples needs.
    pub fn scratch_len(&self, samples: usize) -> usize {
        if self.packs_low() { samples * self.low_pixels * panel_widths(self.isa)[0] } else { 0 }
    }

    /// Whether columns of the low operand are copied together first: far-apart rows would collide in the L1 cache.
    fn packs_low(&self) -> bool {
        self.pointwise && self.channels.low > panel_widths(self.isa)[0]
    }

    /// Adds to `gradient` (taps, high channels, low channels) the sum over samples, low rows and low columns of
    /// `high * low`, or sets it to that sum. `high` is (samples, high pixels, high channels), `low` (samples, low
    /// pixels, low channels) followed by at least [`SLACK`] more floats.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn run(&self, samples: usize, operands: ReduceOperands<'_>) {
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
        for panel in panels(self.isa, channels.low, 0) {
            let (b, b_stride) = if self.packs_low() {
                let rows = samples * self.low_pixels;
                let packed = &mut scratch[..rows * panel.width];
                elementwise::copy_columns(low, channels.low, panel.start, panel.columns, packed, panel.width);
                (packed.as_ptr(), panel.width)
            } else {
                (low[panel.start..].as_ptr(), channels.low)
            };
            for group in &self.groups {
                let whole = [Run { a: 0, b: 0, depth: index(samples * self.low_pixels) }];
                let (runs, repeats) = if self.pointwise { (&whole[..], 1) } else { (&group.runs[..], samples) };
                let block = Block {
                    a: high.as_ptr(),
                    b,
                    c: gradient[panel.start..].as_mut_ptr(),
                    rows: &group.rows,
                    runs,
                    repeats,
                    a_repeat: self.high_len,
                    b_repeat: self.low_pixels,
                    a_step: self.a_step,
                    b_stride,
                    columns: panel.columns,
                    start: if accumulate { Start::Accumulate } else { Start::Zero },
                    finish: Finish::Keep,
                };
                debug_assert!(panel_width(self.isa, panel.columns) <= SLACK);
                // SAFETY: rows and runs were checked against one sample's sizes when the plan was made, and the lengths
                // above are those of `samples` samples; whole vectors of `low` end within the slack (or within the
                // packed copy, whose rows are whole vectors); rows and panels of `gradient` do not overlap.
                unsafe { microkernel::run(self.isa, &block) }
            }
        }
    }
}

/// What a [`Reduce`] reads and writes; see [`Reduce::run`].
pub struct ReduceOperands<'a> {
    /// (samples, high pixels, high channels)
    pub high: &'a [f32],
    /// (samples, low pixels, low channels), then [`SLACK`].
    pub low: &'a [f32],
    /// (taps, high channels, low channels)
    pub gradient: &'a mut [f32],
    /// Whether `gradient` is added to or overwritten.
    pub accumulate: bool,
    /// At least [`Reduce::scratch_len`] floats.
    pub scratch: &'a mut [f32],
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
    let mut runs = Vec::new();
    for y in area.top..area.bottom {
        let high_y = (y * relation.strides.rows) as isize - relation.padding.rows as isize;
        let high_x = (area.left * relation.strides.columns) as isize - relation.padding.columns as isize;
        let a = (high_y * width as isize + high_x) * channels.high as isize;
        let run = Run {
            a: i32::try_from(a).expect("offsets within a sample fit 32 bits"),
            b: index(y * relation.low.columns + area.left),
            depth: index(area.right - area.left),
        };
        push_merged(&mut runs, run, relation.strides.columns * channels.high);
    }
    ReduceGroup { rows: rows.collect(), runs }
}
