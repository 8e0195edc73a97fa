//! The one register-blocked loop that does every product-sum of Lockstep.
//!
//! A *tile* is a few rows of the output by a few vectors of its columns, kept in registers while the summed index runs.
//! Each output is `epilogue(init + a_0 b_0 + a_1 b_1 + ... + 0)`, a chain of fused multiply-adds in the order of the index. (The
//! 0 turns -0 to +0.)
//! Vectors run across columns, rows are independent, and the summed index is never split: the tile's size is a matter
//! of speed alone.
//!
//! What is said here of products of floats holds for pairs of bfloat16 numbers too ([`Element`]), whose product is a sum
//! of two: the summed index goes through pairs.

#[cfg(target_arch = "x86_64")]
mod amx;
mod blocks;
mod tile;
mod tree;

pub(super) use blocks::{PAIRS as BLOCK_PAIRS, compute_in_blocks};

use super::ahead::{Ahead, Fetching};
use super::isa::{Isa, Kind};
use super::products::{ChainElement, Element, Products};
use super::simd::{Scalar, Simd};

/// Where a row of outputs finds its first operand, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// Offset into `a` that the row's runs are relative to.
    pub a: u32,
    /// Offset into `c` of the row's first column.
    pub c: u32,
}

/// A stretch of the summed index in which both operands advance by constant steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Offset into `a`, relative to the row's.
    pub a: i32,
    /// First row of `b`.
    pub b: u32,
    /// Number of products.
    pub depth: u32,
    /// Products of a *line*, of which the depth is a multiple: where products are added in blocks, no block goes beyond it.
    /// Elsewhere nobody looks.
    pub line: u32,
}

impl Run {
    /// The line of a segment that is one stretch, and one line.
    pub(super) const WHOLE: u32 = u32::MAX;
}

/// What an output is before the first product.
#[derive(Clone, Copy)]
pub(super) enum Start {
    Zero,
    /// What `c` holds: earlier sums.
    Accumulate,
    /// One value for each column.
    Bias(*const f32),
}

/// What happens to an output after the last product.
#[derive(Clone, Copy)]
pub(super) enum Finish {
    Keep,
    /// 0 where the output is not above 0.
    Relu,
    /// 0 where the float at the same offset of another buffer is not above 0.
    Gate(*const f32),
}

/// A block of outputs: `c[row.c + j] = finish(start + sum over repeats, runs, k of a[..] * b[..])` for
/// `j < columns`, where the product of step `k` of a run in repeat `r` is
/// `a[row.a + r * a_repeat + run.a + k * a_step] * b[(r * b_repeat + run.b + k) * b_stride + j]`.
///
/// The repeats come in *segments*. If there are several, a power of two, each is a sum of its own from 0, and they are
/// added as a perfect binary tree, left + right, before `finish`. Then each segment must be one long stretch (a single run,
/// in which repeats follow each other), and the operands of the rows of a tile must adjoin.
pub struct Block<'a, E> {
    pub(super) a: *const E,
    pub(super) b: *const E,
    pub(super) c: *mut f32,
    pub(super) rows: &'a [Row],
    pub(super) runs: &'a [Run],
    /// How often each segment goes through the runs.
    pub(super) segments: &'a [usize],
    /// Offsets of a repeat (in elements of `a`, in rows of `b`).
    pub(super) a_repeat: usize,
    pub(super) b_repeat: usize,
    pub(super) a_step: usize,
    pub(super) b_stride: usize,
    /// At most [`panel_widths`]' widest.
    pub(super) columns: usize,
    pub(super) start: Start,
    pub(super) finish: Finish,
    /// On which instruction set the sums of several segments, and of their tree, are rounded to bfloat16, if they are.
    pub(super) rounded_on: Option<Isa>,
    /// What to fetch meanwhile, if segments are stretches.
    pub(super) ahead: Option<Ahead>,
}

/// Widths into which columns are cut for an instruction set, widest first. Whole vectors of `b` are read up to such a
/// width, also where there are fewer columns.
pub(super) fn panel_widths(isa: Isa) -> &'static [usize] {
    match isa.kind() {
        Kind::Scalar => &[8],
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => &[16, 8],
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => &[64, 32, 16],
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => &[16, 8],
    }
}

/// Columns of a first operand that are copied together where the rows of a tile take operands that adjoin: whole tiles that
/// add a tree of segments, of any height.
///
/// Tiles of AVX2 read little at a time. If the rest of a line is not read until the panel has gone by, the L1 cache does
/// not keep it.
pub(super) fn group_columns(isa: Isa) -> usize {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => 12,
        // Whole cache lines.
        _ => 48,
    }
}

impl<E> Block<'_, E> {
    /// The only run, if each repeat goes on where the one before it ended: then a segment is one long run.
    fn stretch(&self) -> Option<Run> {
        let &[run] = self.runs else { return None };
        let depth = run.depth as usize;
        (self.a_repeat == depth * self.a_step && self.b_repeat == depth).then_some(run)
    }

    /// Occasions to fetch memory that a tile of one segment has.
    fn pieces(&self) -> usize {
        self.stretch().map_or(0, |run| (self.segments[0] * run.depth as usize).div_ceil(PIECE))
    }
}

/// Rows that keep multiply-adds busy: sums of 4 rows by 2 vectors hide the latency of two units.
const LOW: usize = 4;
/// Rows of the highest tile for what is left.
const HIGHEST_OF_REST: usize = 5;

/// Products of an output between two occasions to fetch memory.
const PIECE: usize = 16;

/// Segments that a block may have: a tile keeps a sum for each level of their tree.
pub(super) const MAX_SEGMENTS: usize = 1 << MAX_LEVELS;
const MAX_LEVELS: usize = 8;

/// Whether the instruction set has tiles of registers that can be used for products that are added in blocks.
pub(super) fn has_tiles(isa: Isa) -> bool {
    match isa.kind() {
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => amx::is_usable(),
        _ => false,
    }
}

/// The narrowest panel that holds `columns` columns.
pub(super) fn panel_width(isa: Isa, columns: usize) -> usize {
    let widths = panel_widths(isa);
    *widths.iter().rev().find(|&&width| width >= columns).unwrap_or(&widths[0])
}

/// Computes a block. Returns whether all outputs are known to be finite; where there is one segment, nobody looks.
///
/// # Safety
/// For every row, repeat, run and step, the element of `a` must be readable, and so must `panel_width(columns)`
/// elements of `b` from the start of its row; `columns` floats from each row's place in `c` must be readable and writable by
/// this call alone, and readable in the bias and in the gate where there is one.
pub(super) unsafe fn run<E: Element>(isa: Isa, block: &Block<'_, E>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { E::compute(isa, block) }
}

/// What [`Element::compute`] does.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(super) unsafe fn compute<E: ChainElement>(isa: Isa, block: &Block<'_, E>) -> bool {
    let is_tree = block.segments.len() > 1;
    match isa.kind() {
        // SAFETY: the caller's promises are the callee's.
        Kind::Scalar if is_tree => unsafe { trees::<E::On<Scalar>, 2, 1, 2>(block) },
        // SAFETY: as above.
        Kind::Scalar => unsafe { singles::<E::On<Scalar>, 4, 1>(block) },
        // SAFETY: as above, and a value of `Isa` exists only for instruction sets that were detected.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(block) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 if E::has_instruction() => unsafe { avx512_by_instruction(block, isa.halves_vectors()) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(block, isa.halves_vectors()) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe {
            use super::simd::arm::Neon;
            match (is_tree, panel_width(isa, block.columns)) {
                (false, 16) => singles::<E::On<Neon>, 6, 4>(block),
                (false, _) => singles::<E::On<Neon>, 8, 2>(block),
                (true, 16) => trees::<E::On<Neon>, 3, 4, 2>(block),
                (true, _) => trees::<E::On<Neon>, 6, 2, 2>(block),
            }
        },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<E: ChainElement>(block: &Block<'_, E>) -> bool {
    use super::simd::x86::Avx2;
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match (block.segments.len() > 1, block.columns) {
            (false, 9..) => singles::<E::On<Avx2>, 6, 2>(block),
            (false, _) => singles::<E::On<Avx2>, 8, 1>(block),
            (true, 9..) => trees::<E::On<Avx2>, 3, 2, 2>(block),
            (true, _) => trees::<E::On<Avx2>, 6, 1, 2>(block),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512<E: ChainElement>(block: &Block<'_, E>, in_halves: bool) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { tiles_of_avx512::<E::On<super::simd::x86::Avx512>>(block, in_halves) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn avx512_by_instruction<E: ChainElement>(block: &Block<'_, E>, in_halves: bool) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe { tiles_of_avx512::<E::ByInstruction>(block, in_halves) }
}

/// A tree's tile sums two segments at a time where multiply-adds take two turns: what is stored takes two turns there, too.
/// Elsewhere operands could not be loaded fast enough for low tiles.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn tiles_of_avx512<P: Products>(block: &Block<'_, P::Element>, in_halves: bool) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match (block.segments.len() > 1, block.columns) {
            (false, 33..) => singles::<P, 6, 4>(block),
            (false, 17..) => singles::<P, 8, 2>(block),
            (false, _) => singles::<P, 8, 1>(block),
            (true, 33..) if in_halves => trees::<P, 3, 4, 2>(block),
            (true, 17..) if in_halves => trees::<P, 6, 2, 2>(block),
            (true, _) if in_halves => trees::<P, 6, 1, 2>(block),
            (true, 33..) => trees::<P, 6, 4, 1>(block),
            (true, 17..) => trees::<P, 8, 2, 1>(block),
            (true, _) => trees::<P, 8, 1, 1>(block),
        }
    }
}

/// Tiles of one segment; nobody looks whether their outputs are finite.
#[inline(always)]
unsafe fn singles<P: Products, const R: usize, const V: usize>(block: &Block<'_, P::Element>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match block.columns == V * P::Sums::LANES {
            true => singles_of::<P, R, V, true>(block),
            false => singles_of::<P, R, V, false>(block),
        }
    }
    false
}

/// Tiles that add a tree of segments, `S` of which are summed at a time.
#[inline(always)]
unsafe fn trees<P: Products, const T: usize, const V: usize, const S: usize>(block: &Block<'_, P::Element>) -> bool {
    // SAFETY: the caller's promises are the callee's.
    unsafe {
        match block.columns == V * P::Sums::LANES {
            true => trees_of::<P, T, V, S, true>(block),
            false => trees_of::<P, T, V, S, false>(block),
        }
    }
}

/// Cuts the rows into tiles of `R`, and what is left evenly into lower ones, together with the last tile of `R` if it would be
/// fewer than [`LOW`].
#[inline(always)]
unsafe fn singles_of<P: Products, const R: usize, const V: usize, const WHOLE: bool>(block: &Block<'_, P::Element>) {
    let rows = block.rows;
    let mut whole = rows.len() / R;
    let mut left = rows.len() % R;
    if whole > 0 && (1..LOW).contains(&left) {
        whole -= 1;
        left += R;
    }
    let lower = left.div_ceil(HIGHEST_OF_REST);
    let occasions = block.ahead.as_ref().map_or(0, |_| (whole + lower) * block.pieces());
    let mut fetching = Fetching::new(block.ahead.as_ref(), occasions);
    let (tiles, mut rest) = rows.split_at(whole * R);
    // SAFETY: tiles are made of rows of the block; the caller's promises cover them.
    unsafe {
        tile::all::<P, R, V, WHOLE>(block, tiles, &mut fetching);
        for parts in (1..=lower).rev() {
            let (tile, after) = rest.split_at(rest.len().div_ceil(parts));
            match tile.len() {
                5 => tile::all::<P, 5, V, WHOLE>(block, tile, &mut fetching),
                4 => tile::all::<P, 4, V, WHOLE>(block, tile, &mut fetching),
                3 => tile::all::<P, 3, V, WHOLE>(block, tile, &mut fetching),
                2 => tile::all::<P, 2, V, WHOLE>(block, tile, &mut fetching),
                _ => tile::all::<P, 1, V, WHOLE>(block, tile, &mut fetching),
            }
            rest = after;
        }
    }
}

/// Cuts the rows into tiles of `T`, then 4, 2 and 1.
#[inline(always)]
unsafe fn trees_of<P: Products, const T: usize, const V: usize, const S: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
) -> bool {
    let occasions = block.rows.len().div_ceil(T) * (block.segments.len() / S);
    let mut fetching = Fetching::new(block.ahead.as_ref(), occasions);
    let (tiles, mut rest) = block.rows.as_chunks::<T>();
    // SAFETY: tiles are made of rows of the block; the caller's promises cover them.
    unsafe {
        let mut finite = tree::all::<P, T, V, S, WHOLE>(block, tiles, &mut fetching);
        if T > 4 {
            let (fours, after) = rest.as_chunks::<4>();
            finite &= tree::all::<P, 4, V, S, WHOLE>(block, fours, &mut fetching);
            rest = after;
        }
        if T > 2 {
            let (pairs, after) = rest.as_chunks::<2>();
            finite &= tree::all::<P, 2, V, S, WHOLE>(block, pairs, &mut fetching);
            rest = after;
        }
        finite & tree::all::<P, 1, V, S, WHOLE>(block, rest.as_chunks::<1>().0, &mut fetching)
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use crate::kernel::bf16::Bf16Pair;
    use crate::kernel::products::has_instruction;
    use crate::rng::{Purpose, Stream};

    /// Floats of a row of outputs and of the second operand.
    const WIDTH: usize = 64;

    /// Sums of one segment that goes through the runs once, with the first operand's elements side by side.
    fn block<'a, E>(a: &[E], b: &[E], c: &mut [f32], rows: &'a [Row], runs: &'a [Run], columns: usize) -> Block<'a, E> {
        Block {
            a: a.as_ptr(),
            b: b.as_ptr(),
            c: c.as_mut_ptr(),
            rows,
            runs,
            segments: &[1],
            a_repeat: 0,
            b_repeat: 0,
            a_step: 1,
            b_stride: WIDTH,
            columns,
            start: Start::Zero,
            finish: Finish::Keep,
            rounded_on: None,
            ahead: None,
        }
    }

    /// Scenario: blocks of every number of columns, with tiles of all heights, by the instruction for pairs and by
    /// two fused multiply-adds. Property: the same bits.
    #[test]
    fn the_instruction_for_pairs_gives_the_bits_of_multiply_adds() {
        let Some(isa) = Isa::available().into_iter().find(|&isa| has_instruction(isa)) else {
            return eprintln!("no instruction for pairs here");
        };
        const ROWS: usize = 15;
        const DEPTH: usize = 37;
        let mut stream = Stream::new(2, Purpose::SelfTest, 0, 0);
        let mut random = |_| stream.uniform() * 2.0 - 1.0;
        let rows: Vec<Row> = (0..ROWS).map(|i| Row { a: (i * DEPTH) as u32, c: (i * WIDTH) as u32 }).collect();
        let runs = [Run { a: 0, b: 0, depth: DEPTH as u32, line: DEPTH as u32 }];
        let bias: Vec<f32> = (0..WIDTH).map(&mut random).collect();
        let mut pairs =
            |len: usize| -> Vec<Bf16Pair> { (0..len).map(|i| Bf16Pair::new(random(i), random(i))).collect() };
        let (a, b) = (pairs(ROWS * DEPTH), pairs(DEPTH * WIDTH));
        for columns in 1..=WIDTH {
            let compute = |run: unsafe fn(&Block<'_, Bf16Pair>, bool) -> bool| {
                let mut c = vec![f32::NAN; ROWS * WIDTH];
                let block = Block {
                    start: Start::Bias(bias.as_ptr()),
                    finish: Finish::Relu,
                    ..block(&a, &b, &mut c, &rows, &runs, columns)
                };
                // SAFETY: operands have as many rows and columns as the block says, and the machine has AVX-512 BF16.
                unsafe { run(&block, false) };
                c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert_eq!(compute(avx512_by_instruction), compute(avx512), "{columns} columns on {isa}");
        }
    }

    /// Scenario: trees of 2 to 16 segments, some of them empty, with tiles of all heights and nodes of both precisions, two
    /// segments at a time and one. Property: the same bits, and the same findings about what is finite.
    #[test]
    fn trees_of_a_segment_and_of_two_at_a_time_are_the_same() {
        let Some(isa) = Isa::available().into_iter().find(|&isa| isa.kind() == Kind::Avx512) else {
            return eprintln!("no AVX-512 here");
        };
        const ROWS: usize = 15;
        let mut stream = Stream::new(3, Purpose::SelfTest, 0, 0);
        let segments: Vec<usize> = (0..16).map(|i| [5, 7, 0, 1][i % 4]).collect();
        let depth = segments.iter().sum::<usize>();
        let mut random = |len: usize| (0..len).map(|_| stream.uniform() * 2.0 - 1.0).collect::<Vec<_>>();
        let (mut a, b) = (random(ROWS * depth), random(WIDTH * depth));
        let rows: Vec<Row> = (0..ROWS).map(|i| Row { a: i as u32, c: (i * WIDTH) as u32 }).collect();
        let runs = [Run { a: 0, b: 0, depth: 1, line: Run::WHOLE }];
        for columns in 1..=WIDTH {
            let levels = 1 + columns % 4;
            let rounded_on = Some(isa).filter(|_| columns % 2 == 0);
            a[0] = if columns % 5 == 0 { f32::INFINITY } else { 0.5 };
            let compute = |in_halves: bool| {
                let mut c = vec![f32::NAN; ROWS * WIDTH];
                let block = Block {
                    segments: &segments[..1 << levels],
                    a_repeat: ROWS,
                    b_repeat: 1,
                    a_step: ROWS,
                    rounded_on,
                    ..block(&a, &b, &mut c, &rows, &runs, columns)
                };
                // SAFETY: operands have as many rows and columns as the block says, and the machine has AVX-512.
                let finite = unsafe { avx512(&block, in_halves) };
                (finite, c.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            };
            assert_eq!(compute(true), compute(false), "{columns} columns, {levels} levels, {rounded_on:?}");
            assert!(columns % 5 != 0 || !compute(false).0, "{columns} columns with an infinite factor");
        }
    }
}
