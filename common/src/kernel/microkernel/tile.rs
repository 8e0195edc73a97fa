//! A tile of outputs in registers: start values, products, results.
#![expect(
    clippy::needless_range_loop,
    reason = "counted loops over the const sizes are what the compiler unrolls; iterators over the same arrays it does not always"
)]

use super::{Block, Finish, PIECE, Row, Run, Start};
use crate::kernel::ahead::Fetching;
use crate::kernel::products::{Products, Vector};
use crate::kernel::simd::Simd;

/// Sums of a tile in memory. The largest one of any instruction set has 8 rows of 64 columns.
#[repr(align(64))]
pub(super) struct Sums(std::mem::MaybeUninit<[f32; 8 * 64]>);

impl Sums {
    pub(super) const UNINIT: Self = Self(std::mem::MaybeUninit::uninit());

    /// Where a vector lies.
    #[inline(always)]
    pub(super) fn vector<P: Products>(&mut self, i: usize) -> *mut f32 {
        self.0.as_mut_ptr().cast::<f32>().wrapping_add(i * P::Sums::LANES)
    }
}

/// Accumulators of a tile.
pub(super) type Accumulators<P, const R: usize, const V: usize> = [[Vector<P>; V]; R];

/// Stores the sums of a tile, one after the other.
///
/// # Safety
/// There must be room for the vectors at `to`.
#[inline(always)]
pub(super) unsafe fn store_sums<P: Products, const R: usize, const V: usize>(
    to: *mut f32,
    sums: &Accumulators<P, R, V>,
) {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: the caller's promise.
            unsafe { P::Sums::store(to.add((i * V + v) * P::Sums::LANES), sums[i][v]) }
        }
    }
}

/// What [`store_sums`] has stored.
///
/// # Safety
/// The vectors were stored at `from`.
#[inline(always)]
pub(super) unsafe fn load_sums<P: Products, const R: usize, const V: usize>(from: *const f32) -> Accumulators<P, R, V> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[P::Sums::splat(0.0); V]; R];
        for i in 0..R {
            for v in 0..V {
                sums[i][v] = P::Sums::load(from.add((i * V + v) * P::Sums::LANES));
            }
        }
        sums
    }
}

/// All tiles of a height.
///
/// # Safety
/// The tiles' rows belong to the block, for which the caller promises what [`super::run`] asks for.
#[inline(always)]
pub(super) unsafe fn all<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    tiles: &[[Row; R]],
    fetching: &mut Fetching,
) {
    for rows in tiles {
        // SAFETY: the caller's promise.
        unsafe { single::<P, R, V, WHOLE>(block, rows, block.segments[0], fetching) }
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
    // SAFETY: `Sums` have room for R * V vectors, which are stored before they are read; the rest is the caller's promise.
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
        let mut acc = load_sums::<P, R, V>(starts.vector::<P>(0));
        segment::<P, R, V>(block, rows, (0, block.b), repeats, &mut acc, fetching);
        finish::<P, R, V, WHOLE>(block, rows, &acc);
    }
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
pub(super) unsafe fn finish<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
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
            unsafe { product::<P, R, V>(a_rows, a, b, acc) }
            a += block.a_step as isize;
            b = b.wrapping_add(block.b_stride);
        }
        left -= piece;
    }
}

/// One product of each output, whose operands begin at `a` and `b`.
#[inline(always)]
pub(super) unsafe fn product<P: Products, const R: usize, const V: usize>(
    a_rows: &[*const P::Element; R],
    a: isize,
    b: *const P::Element,
    acc: &mut Accumulators<P, R, V>,
) {
    // SAFETY: operands are readable by the caller's promise.
    unsafe {
        part::<P, R, V, 0>(a_rows, a, b, acc);
        if P::PARTS > 1 {
            part::<P, R, V, 1>(a_rows, a, b, acc);
        }
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
