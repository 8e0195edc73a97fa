//! One tile of outputs in registers: its products, and the tree of its segments.
#![expect(
    clippy::needless_range_loop,
    reason = "counted loops over the const sizes are what the compiler unrolls; iterators over the same arrays it does not always"
)]

use std::ops::Range;

use super::{Block, Finish, MAX_LEVELS, PIECE, Row, Run, Start};
use crate::kernel::ahead::Fetching;
use crate::kernel::bf16;
use crate::kernel::precision::Precision;
use crate::kernel::products::{Products, Vector};
use crate::kernel::simd::Simd;

/// Tiles that go through a segment one after the other, while its rows of the second operand are in the L1 cache.
const TOGETHER: usize = 4;

/// Sums of a tile in memory. The largest one of any instruction set has 8 rows of 64 columns.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Sums(std::mem::MaybeUninit<[f32; 8 * 64]>);

impl Sums {
    const UNINIT: Self = Self(std::mem::MaybeUninit::uninit());

    /// Where a vector lies.
    #[inline(always)]
    fn vector<P: Products>(&mut self, i: usize) -> *mut f32 {
        self.0.as_mut_ptr().cast::<f32>().wrapping_add(i * P::Sums::LANES)
    }

    #[inline(always)]
    unsafe fn store<P: Products, const R: usize, const V: usize>(&mut self, acc: &Accumulators<P, R, V>) {
        for i in 0..R {
            for v in 0..V {
                // SAFETY: there is room for R * V vectors.
                unsafe { P::Sums::store(self.vector::<P>(i * V + v), acc[i][v]) }
            }
        }
    }

    /// What was stored.
    #[inline(always)]
    unsafe fn load<P: Products, const R: usize, const V: usize>(&mut self) -> Accumulators<P, R, V> {
        // SAFETY: R * V vectors were stored, by the caller's promise.
        unsafe {
            let mut acc = [[P::Sums::splat(0.0); V]; R];
            for i in 0..R {
                for v in 0..V {
                    acc[i][v] = P::Sums::load(self.vector::<P>(i * V + v));
                }
            }
            acc
        }
    }
}

/// Accumulators of a tile.
type Accumulators<P, const R: usize, const V: usize> = [[Vector<P>; V]; R];

/// All tiles of a height. Returns whether all outputs are known to be finite.
///
/// # Safety
/// The tiles' rows belong to the block, for which the caller promises what [`super::run`] asks for.
#[inline(always)]
pub(super) unsafe fn all<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    tiles: &[[Row; R]],
    fetching: &mut Fetching,
) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        if let &[repeats] = block.segments {
            tiles.iter().for_each(|rows| single::<P, R, V, WHOLE>(block, rows, repeats, fetching));
            return tiles.is_empty();
        }
        tiles.chunks(TOGETHER).fold(true, |finite, tiles| finite & tree::<P, R, V, WHOLE>(block, tiles, fetching))
    }
}

/// A tile of one segment: start values, products, results. (The segment may go on in another block, so that it is not
/// rounded.)
///
/// The start values take the way through memory so that the compiler does not know them to be equal; it would merge
/// accumulators and shuffle them apart again.
#[inline(always)]
unsafe fn single<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    rows: &[Row; R],
    repeats: usize,
    fetching: &mut Fetching,
) {
    let mut starts = Sums::UNINIT;
    // SAFETY: `Sums` hold R * V vectors, which are stored before they are read; the rest is the caller's promise.
    unsafe {
        for (i, row) in rows.iter().enumerate() {
            for v in 0..V {
                let start = match block.start {
                    Start::Zero => P::Sums::splat(0.0),
                    Start::Accumulate => load::<P, WHOLE>(block, block.c.add(row.c as usize), v),
                    Start::Bias(bias) => P::start(load::<P, WHOLE>(block, bias, v)),
                };
                P::Sums::store(starts.vector::<P>(i * V + v), start);
            }
        }
        let mut acc = starts.load::<P, R, V>();
        segment::<P, R, V>(block, rows, (0, block.b), repeats, &mut acc, fetching);
        finish::<P, R, V, WHOLE>(block, rows, &acc);
    }
}

/// Tiles of several segments, each a sum of its own from 0, added as a perfect binary tree.
///
/// Segment `k` completes as many subtrees as `k` has ones at its end in binary: then their left halves wait on the
/// stack, the last one on top.
///
/// Returns whether all sums are known to be finite. Lanes that hold no column may say that they are not.
#[inline(always)]
unsafe fn tree<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    tiles: &[[Row; R]],
    fetching: &mut Fetching,
) -> bool {
    // Sums of complete subtrees of segments, the largest first, none of them under another one.
    let mut subtrees = [[Sums::UNINIT; TOGETHER]; MAX_LEVELS + 1];
    let rounded = block.nodes == Precision::Bf16;
    let (mut a, mut b) = (0, block.b);
    let mut waiting = 0;
    // SAFETY: `Sums` hold R * V vectors, which are stored before they are read; the rest is the caller's promise.
    unsafe {
        // Stays 0 as long as finite sums are multiplied by 0 and added.
        let mut zeros = P::Sums::splat(0.0);
        for (k, &repeats) in block.segments.iter().enumerate() {
            let below = waiting - k.trailing_ones() as usize;
            for (tile, rows) in tiles.iter().enumerate() {
                let mut acc = [[P::Sums::splat(0.0); V]; R];
                segment::<P, R, V>(block, rows, (a, b), repeats, &mut acc, fetching);
                if rounded {
                    subtrees[waiting][tile].store::<P, R, V>(&acc);
                    add_rounded(&mut subtrees, tile, below..waiting, R * V * P::Sums::LANES);
                    acc = subtrees[below][tile].load::<P, R, V>();
                } else {
                    for level in (below..waiting).rev() {
                        let left = subtrees[level][tile].load::<P, R, V>();
                        for i in 0..R {
                            for v in 0..V {
                                acc[i][v] = P::Sums::add(left[i][v], acc[i][v]);
                            }
                        }
                    }
                }
                if k + 1 < block.segments.len() {
                    subtrees[below][tile].store::<P, R, V>(&acc);
                } else {
                    zeros = add_zeros::<P, R, V>(&acc, zeros);
                    finish::<P, R, V, WHOLE>(block, rows, &acc);
                }
            }
            waiting = below + 1;
            a += (repeats * block.a_repeat) as isize;
            b = b.wrapping_add(repeats * block.b_repeat * block.b_stride);
        }
        let mut lanes = Sums::UNINIT;
        P::Sums::store(lanes.vector::<P>(0), zeros);
        (0..P::Sums::LANES).all(|lane| *lanes.vector::<P>(0).add(lane) == 0.0)
    }
}

/// Rounds the sum of a tile on top of the stack, and adds it to those below, each sum rounded, down to the last level.
///
/// # Safety
/// `len` floats of each were stored.
unsafe fn add_rounded(subtrees: &mut [[Sums; TOGETHER]], tile: usize, levels: Range<usize>, len: usize) {
    // SAFETY: the caller's promise.
    let mut of_level = |level: usize| unsafe {
        std::slice::from_raw_parts_mut(subtrees[level][tile].0.as_mut_ptr().cast::<f32>(), len)
    };
    of_level(levels.end).iter_mut().for_each(|sum| *sum = bf16::round(*sum));
    for level in levels.rev() {
        let [left, right] = [of_level(level), of_level(level + 1)];
        left.iter_mut().zip(right).for_each(|(left, right)| *left = bf16::round(*left + *right));
    }
}

/// Adds every accumulator times 0.
#[inline(always)]
unsafe fn add_zeros<P: Products, const R: usize, const V: usize>(
    acc: &Accumulators<P, R, V>,
    mut zeros: Vector<P>,
) -> Vector<P> {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: the machine has the instruction set.
            zeros = unsafe { P::Sums::multiply_add(acc[i][v], P::Sums::splat(0.0), zeros) };
        }
    }
    zeros
}

/// Lanes of vector `v` that hold columns of the block.
#[inline(always)]
fn lanes<P: Products>(block: &Block<'_, P::Element>, v: usize) -> usize {
    block.columns.saturating_sub(v * P::Sums::LANES).min(P::Sums::LANES)
}

/// Vector `v` of a row that begins at `from`.
#[inline(always)]
unsafe fn load<P: Products, const WHOLE: bool>(block: &Block<'_, P::Element>, from: *const f32, v: usize) -> Vector<P> {
    // SAFETY: the block's columns are readable by the caller's promise; no lane, no access.
    unsafe {
        match lanes::<P>(block, v) {
            _ if WHOLE => P::Sums::load(from.add(v * P::Sums::LANES)),
            0 => P::Sums::splat(0.0),
            lanes => P::Sums::load_partial(from.add(v * P::Sums::LANES), lanes),
        }
    }
}

/// Writes a tile's results.
#[inline(always)]
unsafe fn finish<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    rows: &[Row; R],
    acc: &Accumulators<P, R, V>,
) {
    // SAFETY: the block's columns are readable and writable by the caller's promise; no lane, no access.
    unsafe {
        for i in 0..R {
            let row = rows[i];
            for v in 0..V {
                let sum = acc[i][v];
                let result = match block.finish {
                    Finish::Keep => sum,
                    Finish::Relu => P::Sums::gate(sum, sum),
                    Finish::Gate(gate) => P::Sums::gate(load::<P, WHOLE>(block, gate.add(row.c as usize), v), sum),
                };
                let to = block.c.add(row.c as usize + v * P::Sums::LANES);
                match lanes::<P>(block, v) {
                    _ if WHOLE => P::Sums::store(to, result),
                    0 => {}
                    lanes => P::Sums::store_partial(to, result, lanes),
                }
            }
        }
    }
}

/// All products of one segment, whose operands begin at `a` and `b`: the runs, `repeats` times.
#[inline(always)]
unsafe fn segment<P: Products, const R: usize, const V: usize>(
    block: &Block<'_, P::Element>,
    rows: &[Row; R],
    (mut a, mut b): (isize, *const P::Element),
    repeats: usize,
    acc: &mut Accumulators<P, R, V>,
    fetching: &mut Fetching,
) {
    let mut a_rows = [block.a; R];
    for i in 0..R {
        a_rows[i] = block.a.wrapping_add(rows[i].a as usize);
    }
    let b_of = |run: &Run, b: *const P::Element| b.wrapping_add(run.b as usize * block.b_stride);
    // SAFETY: operands are readable by the caller's promise.
    unsafe {
        if let Some(run) = block.stretch() {
            let depth = repeats * run.depth as usize;
            return products::<P, R, V>(block, &a_rows, a + run.a as isize, b_of(&run, b), depth, acc, fetching);
        }
        for _ in 0..repeats {
            for run in block.runs {
                let depth = run.depth as usize;
                products::<P, R, V>(block, &a_rows, a + run.a as isize, b_of(run, b), depth, acc, fetching);
            }
            a += block.a_repeat as isize;
            b = b.wrapping_add(block.b_repeat * block.b_stride);
        }
    }
}

/// The register-critical loop: `depth` products, added to `R` x `V` accumulators.
#[inline(always)]
unsafe fn products<P: Products, const R: usize, const V: usize>(
    block: &Block<'_, P::Element>,
    a_rows: &[*const P::Element; R],
    mut a: isize,
    mut b: *const P::Element,
    depth: usize,
    acc: &mut Accumulators<P, R, V>,
    fetching: &mut Fetching,
) {
    let mut left = depth;
    while left > 0 {
        fetching.some();
        let piece = left.min(PIECE);
        for _ in 0..piece {
            // SAFETY: operands are readable by the caller's promise.
            unsafe {
                part::<P, R, V, 0>(a_rows, a, b, acc);
                if P::PARTS > 1 {
                    part::<P, R, V, 1>(a_rows, a, b, acc);
                }
            }
            a += block.a_step as isize;
            b = b.wrapping_add(block.b_stride);
        }
        left -= piece;
    }
}

/// One part of one product of each output.
#[inline(always)]
unsafe fn part<P: Products, const R: usize, const V: usize, const PART: usize>(
    a_rows: &[*const P::Element; R],
    a: isize,
    b: *const P::Element,
    acc: &mut Accumulators<P, R, V>,
) {
    // SAFETY: operands are readable by the caller's promise.
    unsafe {
        let mut columns = [P::load::<PART>(b); V];
        for v in 1..V {
            columns[v] = P::load::<PART>(b.add(v * P::Sums::LANES));
        }
        for i in 0..R {
            let value = P::splat::<PART>(*a_rows[i].offset(a));
            for v in 0..V {
                acc[i][v] = P::multiply_add(value, columns[v], acc[i][v]);
            }
        }
    }
}
