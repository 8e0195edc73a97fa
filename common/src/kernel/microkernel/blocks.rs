//! Product-sums whose products are added in *blocks*, as the instructions for tiles of AMX add them.
//!
//! A block is at most 16 pairs that follow each other in a line. The first numbers of the pairs make a chain of fused
//! multiply-adds from 0, the second ones another one, and both together are added to the sum:
//!
//! ```text
//! sum = sum + (first + second),  first = a_0 b_0 + a_2 b_2 + ...,  second = a_1 b_1 + a_3 b_3 + ...
//! ```
//!
//! Where there is AMX, `amx.rs` does all blocks of a segment. Elsewhere two chains run in registers, a few rows and vectors at a
//! time, and the sums lie in memory. Both give the same bits: no number is denormal, by what `bf16.rs` says, whose argument holds
//! for partial sums too.

#![expect(
    clippy::needless_range_loop,
    reason = "counted loops over the const sizes are what the compiler unrolls; iterators over the same arrays it does not always"
)]

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::tile::repeat;
use super::{Block, Finish, MAX_LEVELS, Row, Run, Start};
use crate::kernel::bf16::{self, BlockedPair};
use crate::kernel::elementwise;
use crate::kernel::isa::{Isa, Kind};
use crate::kernel::products::{Pairs, Products};
use crate::kernel::simd::{Scalar, Simd};
use crate::kernel::survey;

/// Pairs of a block, at most.
pub(in crate::kernel) const PAIRS: usize = 16;
/// Rows of outputs that are computed together.
pub(super) const ROWS: usize = 16;
/// Columns of a block of outputs, at most.
pub(super) const COLUMNS: usize = 64;

/// Rows of [`COLUMNS`] sums.
#[repr(align(64))]
#[derive(Clone, Copy)]
pub(super) struct Sums(pub(super) [f32; ROWS * COLUMNS]);

impl Sums {
    const ZERO: Self = Self([0.0; ROWS * COLUMNS]);
}

/// Products of a segment that follow each other: where they begin, relative to a row's operand, and to `b`.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub(super) a: isize,
    pub(super) b: usize,
    pub(super) len: usize,
}

/// Some segments of a block that are summed up one after the other.
#[derive(Clone, Copy)]
pub(super) struct Segments<'a> {
    /// Repeats before the first one.
    before: usize,
    /// How often each goes through the runs.
    repeats: &'a [usize],
}

/// The lines of some segments.
pub(super) struct Lines<'a> {
    block: &'a Block<'a, BlockedPair>,
    segments: Segments<'a>,
    /// Whether a segment is one line: then it is a single run, in which repeats follow each other.
    are_whole: bool,
    /// Repeats of the segment that are done.
    done: usize,
    run: usize,
    /// Products of the run before the line.
    first: usize,
}

impl<'a> Lines<'a> {
    pub(super) fn new(block: &'a Block<'a, BlockedPair>, segments: Segments<'a>) -> Self {
        let are_whole = block.runs.first().is_some_and(|run| run.line == Run::WHOLE);
        Self { block, segments, are_whole, done: 0, run: 0, first: 0 }
    }

    /// Pairs of the first line's last block, if it is not full; else 0.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn rest(&self) -> usize {
        let repeats = self.segments.repeats.first().copied().unwrap_or(0);
        self.block.runs.first().map_or(0, |run| match self.are_whole {
            true => repeats * run.depth as usize % PAIRS,
            false => run.line as usize % PAIRS,
        })
    }

    /// The line that begins at a product of a run.
    #[inline]
    fn line(&self, run: &Run, first: usize, len: usize) -> Line {
        let (block, repeat) = (self.block, self.segments.before + self.done);
        Line {
            a: run.a as isize + (repeat * block.a_repeat + first * block.a_step) as isize,
            b: (repeat * block.b_repeat + run.b as usize + first) * block.b_stride,
            len,
        }
    }
}

impl Iterator for Lines<'_> {
    type Item = Line;

    #[inline]
    fn next(&mut self) -> Option<Line> {
        loop {
            let (&repeats, after) = self.segments.repeats.split_first()?;
            if self.done == repeats {
                self.segments = Segments { before: self.segments.before + repeats, repeats: after };
                self.done = 0;
                continue;
            }
            let Some(run) = self.block.runs.get(self.run) else {
                self.done += 1;
                self.run = 0;
                continue;
            };
            if self.are_whole {
                let line = self.line(run, 0, repeats * run.depth as usize);
                self.done = repeats;
                return Some(line);
            }
            if self.first >= run.depth as usize {
                self.run += 1;
                self.first = 0;
                continue;
            }
            let line = self.line(run, self.first, run.line as usize);
            self.first += line.len;
            return Some(line);
        }
    }
}

/// What [`Element::compute`](crate::kernel::Element::compute) does.
///
/// # Safety
/// As for [`super::run`].
pub(in crate::kernel) unsafe fn compute_in_blocks(isa: Isa, block: &Block<'_, BlockedPair>) -> bool {
    match isa.kind() {
        // SAFETY: the caller's promises are the callee's.
        Kind::Scalar => unsafe { all::<Scalar, 1>(isa, block, &mut Portable) },
        // SAFETY: as above, and a value of `Isa` exists only for instruction sets that were detected.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(isa, block) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(isa, block) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { all::<crate::kernel::simd::arm::Neon, 4>(isa, block, &mut Portable) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(isa: Isa, block: &Block<'_, BlockedPair>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<crate::kernel::simd::x86::Avx2, 2>(isa, block, &mut Portable) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(isa: Isa, block: &Block<'_, BlockedPair>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { if amx::is_usable() { by_tiles(isa, block) } else { avx512_without_tiles(isa, block) } }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512_without_tiles(isa: Isa, block: &Block<'_, BlockedPair>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<crate::kernel::simd::x86::Avx512, 4>(isa, block, &mut Portable) }
}

/// By tiles of registers.
///
/// # Safety
/// As for [`super::run`], and the process may use AMX, and AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn by_tiles(isa: Isa, block: &Block<'_, BlockedPair>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<crate::kernel::simd::x86::Avx512, 4>(isa, block, &mut amx::Tiles::new(block)) }
}

/// How products of a segment are added up.
pub(super) trait Adder {
    /// Sets the sums of at most [`ROWS`] rows to what they start from, or 0, plus the products of some segments. `V` vectors are
    /// summed at a time where that matters.
    ///
    /// # Safety
    /// Rows and segments belong to the block, for which the caller promises what [`super::run`] asks for.
    unsafe fn add<S: Simd, const V: usize>(
        &mut self,
        block: &Block<'_, BlockedPair>,
        rows: &[Row],
        segments: Segments<'_>,
        start: Option<&Sums>,
        sums: &mut Sums,
    );
}

/// All rows. Returns whether all outputs are known to be finite.
#[inline(always)]
unsafe fn all<S: Simd, const V: usize>(isa: Isa, block: &Block<'_, BlockedPair>, adder: &mut impl Adder) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match block.segments {
            [_] => singles::<S, V>(block, adder),
            _ => trees::<S, V>(isa, block, adder),
        }
    }
}

/// Sums of one segment; nobody looks whether they are finite.
#[inline(always)]
unsafe fn singles<S: Simd, const V: usize>(block: &Block<'_, BlockedPair>, adder: &mut impl Adder) -> bool {
    let segments = Segments { before: 0, repeats: block.segments };
    let [mut starts, mut sums] = [Sums::ZERO; 2];
    // SAFETY: rows belong to the block; the rest is the caller's promise.
    unsafe {
        if let Start::Bias(bias) = block.start {
            start_from_bias::<S>(block, bias, &mut starts);
        }
        for rows in block.rows.chunks(ROWS) {
            if let Start::Accumulate = block.start {
                start_from_outputs::<S>(block, rows, &mut starts);
            }
            let start = (!matches!(block.start, Start::Zero)).then_some(&starts);
            adder.add::<S, V>(block, rows, segments, start, &mut sums);
            finish::<S>(block, rows, &sums);
        }
    }
    false
}

/// Sums of several segments, added as a tree: segment `k` completes as many larger subtrees as `k` has ones at its end in binary,
/// whose left halves wait on a stack.
///
/// A right leaf that is a single block may be added to its left sibling while that is being summed up: what it adds is its sum.
#[inline(always)]
unsafe fn trees<S: Simd, const V: usize>(isa: Isa, block: &Block<'_, BlockedPair>, adder: &mut impl Adder) -> bool {
    let mut stack = [Sums::ZERO; MAX_LEVELS + 1];
    let mut finite = true;
    let is_block = |&repeats: &usize| repeats * block.runs[0].depth as usize <= PAIRS;
    let by_twos = block.rounded_on.is_none() && block.segments.iter().skip(1).step_by(2).all(is_block);
    let together = if by_twos { 2 } else { 1 };
    for rows in block.rows.chunks(ROWS) {
        let (mut waiting, mut before, len) = (0, 0, rows.len() * COLUMNS);
        for (k, repeats) in block.segments.chunks(together).enumerate() {
            // SAFETY: rows and segments belong to the block; the rest is the caller's promise.
            unsafe { adder.add::<S, V>(block, rows, Segments { before, repeats }, None, &mut stack[waiting]) };
            before += repeats.iter().sum::<usize>();
            if let Some(isa) = block.rounded_on {
                bf16::round_all(isa, &mut stack[waiting].0[..len]);
            }
            waiting += 1;
            for _ in 0..k.trailing_ones() {
                waiting -= 1;
                let [.., left, right] = &mut stack[..=waiting] else { break };
                match block.rounded_on {
                    None => elementwise::add(isa, &mut left.0[..len], &right.0[..len]),
                    Some(isa) => bf16::add_rounded(isa, &mut left.0[..len], &right.0[..len]),
                }
            }
        }
        let sums = &stack[0];
        // In lanes that hold no column, there may be anything.
        let mut columns = sums.0[..len].chunks_exact(COLUMNS).map(|sums| &sums[..block.columns]);
        finite &= columns.all(|sums| survey::floats_are_finite(isa, sums));
        // SAFETY: as above.
        unsafe { finish::<S>(block, rows, sums) };
    }
    finite
}

/// Columns of the vector that begins with column `v`.
#[inline(always)]
fn lanes<S: Simd>(block: &Block<'_, BlockedPair>, v: usize) -> usize {
    (block.columns - v).min(S::LANES)
}

/// Sets all rows to the bias.
#[inline(always)]
unsafe fn start_from_bias<S: Simd>(block: &Block<'_, BlockedPair>, bias: *const f32, starts: &mut Sums) {
    for v in (0..block.columns).step_by(S::LANES) {
        for row in starts.0.chunks_exact_mut(COLUMNS) {
            // SAFETY: the bias has the block's columns, by the caller's promise.
            unsafe {
                let bias = S::load_partial(bias.add(v), lanes::<S>(block, v));
                S::store(row[v..].as_mut_ptr(), Pairs::<S>::start(bias));
            }
        }
    }
}

/// Sets rows to what their outputs are.
#[inline(always)]
unsafe fn start_from_outputs<S: Simd>(block: &Block<'_, BlockedPair>, rows: &[Row], starts: &mut Sums) {
    for (row, starts) in rows.iter().zip(starts.0.chunks_exact_mut(COLUMNS)) {
        for v in (0..block.columns).step_by(S::LANES) {
            // SAFETY: outputs have the block's columns, by the caller's promise.
            unsafe {
                let outputs = S::load_partial(block.c.add(row.c as usize + v), lanes::<S>(block, v));
                S::store(starts[v..].as_mut_ptr(), outputs);
            }
        }
    }
}

/// Writes the rows' results, of which none is -0.
#[inline(always)]
unsafe fn finish<S: Simd>(block: &Block<'_, BlockedPair>, rows: &[Row], sums: &Sums) {
    for (row, sums) in rows.iter().zip(sums.0.chunks_exact(COLUMNS)) {
        for v in (0..block.columns).step_by(S::LANES) {
            let (lanes, place) = (lanes::<S>(block, v), row.c as usize + v);
            // SAFETY: outputs and gates have the block's columns, by the caller's promise.
            unsafe {
                let sum = S::add(S::load(sums[v..].as_ptr()), S::splat(0.0));
                let result = match block.finish {
                    Finish::Keep => sum,
                    Finish::Relu => S::gate(sum, sum),
                    Finish::Gate(gate) => S::gate(S::load_partial(gate.add(place), lanes), sum),
                };
                S::store_partial(block.c.add(place), result, lanes);
            }
        }
    }
}

/// Blocks by two fused multiply-adds for each pair: the specification of those by tiles.
pub(super) struct Portable;

impl Adder for Portable {
    #[inline(always)]
    unsafe fn add<S: Simd, const V: usize>(
        &mut self,
        block: &Block<'_, BlockedPair>,
        rows: &[Row],
        segments: Segments<'_>,
        start: Option<&Sums>,
        sums: &mut Sums,
    ) {
        let len = rows.len() * COLUMNS;
        match start {
            Some(start) => sums.0[..len].copy_from_slice(&start.0[..len]),
            None => sums.0[..len].fill(0.0),
        }
        for Line { a, b, len } in Lines::new(block, segments) {
            for first in (0..len).step_by(PAIRS) {
                let depth = PAIRS.min(len - first);
                let a = block.a.wrapping_offset(a + (first * block.a_step) as isize);
                let b = block.b.wrapping_add(b + first * block.b_stride);
                let (twos, one) = rows.as_chunks::<2>();
                for (rows, sums) in twos.iter().zip(sums.0.chunks_exact_mut(2 * COLUMNS)) {
                    // SAFETY: the caller's promise.
                    unsafe { add_to_rows::<S, 2, V>(block, [a, b], rows, depth, sums) }
                }
                if let Some(row) = one.first() {
                    // SAFETY: the caller's promise.
                    unsafe {
                        add_to_rows::<S, 1, V>(block, [a, b], &[*row], depth, &mut sums.0[(rows.len() - 1) * COLUMNS..])
                    }
                }
            }
        }
    }
}

/// Adds one block of products to some rows.
#[inline(always)]
unsafe fn add_to_rows<S: Simd, const R: usize, const V: usize>(
    block: &Block<'_, BlockedPair>,
    [a, b]: [*const BlockedPair; 2],
    rows: &[Row; R],
    depth: usize,
    sums: &mut [f32],
) {
    let a_rows = rows.map(|row| a.wrapping_add(row.a as usize));
    let vectors = block.columns.div_ceil(S::LANES);
    let mut v = 0;
    // SAFETY: whole vectors of `b` are readable by the caller's promise.
    unsafe {
        while v + V <= vectors {
            add_to_tile::<S, R, V>(block, a_rows, b.wrapping_add(v * S::LANES), depth, &mut sums[v * S::LANES..]);
            v += V;
        }
        while v < vectors {
            add_to_tile::<S, R, 1>(block, a_rows, b.wrapping_add(v * S::LANES), depth, &mut sums[v * S::LANES..]);
            v += 1;
        }
    }
}

/// Adds one block of products to some rows of some vectors.
#[inline(always)]
unsafe fn add_to_tile<S: Simd, const R: usize, const V: usize>(
    block: &Block<'_, BlockedPair>,
    a_rows: [*const BlockedPair; R],
    b: *const BlockedPair,
    depth: usize,
    sums: &mut [f32],
) {
    // SAFETY: operands are readable by the caller's promise; there are sums for whole vectors.
    unsafe {
        let zeros = [[S::splat(0.0); V]; R];
        let mut chains = [zeros; 2];
        let (mut at, mut from) = (0, b);
        repeat!(depth, 1, {
            for (i, row) in a_rows.iter().enumerate() {
                let pair = (*row.wrapping_add(at)).pair();
                let numbers = [Pairs::<S>::splat::<0>(pair), Pairs::<S>::splat::<1>(pair)];
                for v in 0..V {
                    let column = from.wrapping_add(v * S::LANES).cast();
                    let columns = [Pairs::<S>::load::<0>(column), Pairs::<S>::load::<1>(column)];
                    for part in 0..2 {
                        chains[part][i][v] = S::multiply_add(numbers[part], columns[part], chains[part][i][v]);
                    }
                }
            }
            at += block.a_step;
            from = from.wrapping_add(block.b_stride);
        });
        let [first, second] = chains;
        for (i, sums) in sums.chunks_mut(COLUMNS).take(R).enumerate() {
            for v in 0..V {
                let place = sums[v * S::LANES..].as_mut_ptr();
                S::store(place, S::add(S::load(place), S::add(first[i][v], second[i][v])));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::ahead::Ahead;
    use crate::rng::{Purpose, Stream};

    /// Rows of outputs: two whole groups and some.
    const OUTPUTS: usize = 2 * ROWS + 5;
    /// Pairs of a row of either operand.
    const DEPTH: usize = 90;

    struct Way {
        name: String,
        isa: Isa,
        compute: unsafe fn(Isa, &Block<'_, BlockedPair>) -> bool,
    }

    /// Every way in which an instruction set computes a block; plain code is the last one.
    fn ways() -> Vec<Way> {
        let mut ways = Vec::new();
        for isa in Isa::available() {
            ways.push(Way { name: isa.to_string(), isa, compute: compute_in_blocks });
            // Where there is AMX, nobody else would try this.
            #[cfg(target_arch = "x86_64")]
            if isa.kind() == Kind::Avx512 {
                let name = "avx512 without tiles".to_owned();
                ways.push(Way { name, isa, compute: avx512_without_tiles });
            }
        }
        ways
    }

    /// Scenario: blocks of every number of columns; sums that begin with a bias, or with what is there, in lines of several lengths;
    /// and trees of leaves of different sizes, rounded or not, whose first operands are columns. Property: all ways give the bits of
    /// plain code.
    #[test]
    fn all_ways_give_the_same_bits() {
        let mut stream = Stream::new(4, Purpose::SelfTest, 0, 0);
        let mut random = |len: usize| (0..len).map(|_| stream.uniform() * 2.0 - 1.0).collect::<Vec<f32>>();
        let pairs = |numbers: Vec<f32>| -> Vec<BlockedPair> {
            numbers.as_chunks().0.iter().map(|&[first, second]| BlockedPair::new(first, second)).collect()
        };
        let (a, b) = (pairs(random(2 * OUTPUTS * DEPTH)), pairs(random(2 * COLUMNS * DEPTH)));
        let (bias, before) = (random(COLUMNS), random(OUTPUTS * COLUMNS));
        let places = |step: usize| (0..OUTPUTS).map(move |i| Row { a: (i * step) as u32, c: (i * COLUMNS) as u32 });
        let (in_rows, in_columns): (Vec<Row>, Vec<Row>) = (places(DEPTH).collect(), places(1).collect());
        let lines = [(0, 40, 20), (40, 3, 3), (43, 33, 33)];
        let in_lines = lines.map(|(first, depth, line)| Run { a: first as i32, b: first, depth, line });
        let whole = [Run { a: 0, b: 0, depth: 1, line: Run::WHOLE }];
        // In the first tree, every right leaf is a block or less.
        let trees = [[40, 3, 0, 16, 1, 2, 17, 11], [16, 3, 0, 40, 1, 2, 17, 11]];
        for columns in 1..=COLUMNS {
            let (starts, is_rounded) = ([Start::Accumulate, Start::Bias(bias.as_ptr()), Start::Zero], columns % 2 == 0);
            let check = |rows: &[Row], runs: &[Run], segments: &[usize], a_step: usize, start: Start| {
                let compute = |&Way { ref name, isa, compute }: &Way| {
                    let mut c = before.clone();
                    let block = Block {
                        a: a.as_ptr(),
                        b: b.as_ptr(),
                        c: c.as_mut_ptr(),
                        rows,
                        runs,
                        segments,
                        a_repeat: a_step,
                        b_repeat: 1,
                        a_step,
                        b_stride: COLUMNS,
                        columns,
                        start,
                        finish: if columns % 3 == 0 { Finish::Relu } else { Finish::Keep },
                        rounded_on: is_rounded.then_some(isa),
                        ahead: None::<Ahead>,
                    };
                    // SAFETY: operands have as many rows and columns as the block says.
                    let finite = unsafe { compute(isa, &block) };
                    assert_eq!(finite, segments.len() > 1, "{name}, {columns} columns: who looks");
                    c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let ways = ways();
                let expected = compute(ways.last().expect("plain code"));
                for way in &ways {
                    assert!(compute(way) == expected, "{}, {columns} columns, {} segments", way.name, segments.len());
                }
            };
            check(&in_rows, &in_lines, &[1], 1, starts[columns % 3]);
            trees.iter().for_each(|leaves| check(&in_columns, &whole, leaves, OUTPUTS, Start::Zero));
        }
    }
}
