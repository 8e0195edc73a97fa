//! A tile of outputs in registers: start values, products, results.
#![expect(
    clippy::needless_range_loop,
    reason = "counted loops over the const sizes are what the compiler unrolls; iterators over the same arrays it does not always"
)]

use super::{Block, Finish, PIECE, Row, Run, Start};
use crate::kernel::ahead::Fetching;
use crate::kernel::products::{Products, Vector};
use crate::kernel::simd::Simd;

/// Repeats a body, with a branch after so many times only.
macro_rules! repeat {
    ($count:expr, $unrolled:expr, $body:block) => {
        let (count, unrolled) = ($count, $unrolled);
        for _ in 0..count / unrolled {
            for _ in 0..unrolled $body
        }
        for _ in 0..count % unrolled $body
    };
}
pub(super) use repeat;

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

/// All tiles of a height, of whose rows there is a multiple.
///
/// # Safety
/// The tiles' rows belong to the block, for which the caller promises what [`super::run`] asks for.
#[inline(always)]
pub(super) unsafe fn all<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    rows: &[Row],
    fetching: &mut Fetching,
) {
    for rows in rows.as_chunks::<R>().0 {
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
    // SAFETY: `Sums` have room for R * V vectors, which are stored before they are read; the rest is the caller's promise.
    unsafe {
        let mut acc = match block.start {
            Start::Accumulate => load_rows::<P, R, V, WHOLE>(block, block.c, rows),
            start => {
                let mut starts = Sums::UNINIT;
                for v in 0..V {
                    let start = match start {
                        Start::Bias(bias) => P::start(load::<P, WHOLE>(block, bias, v)),
                        _ => P::Sums::splat(0.0),
                    };
                    for i in 0..R {
                        P::Sums::store(starts.vector::<P>(i * V + v), start);
                    }
                }
                load_sums::<P, R, V>(starts.vector::<P>(0))
            }
        };
        segment::<P, R, V>(block, rows, repeats, &mut acc, fetching);
        finish::<P, R, V, WHOLE>(block, rows, &acc);
    }
}

/// The rows' floats from a place on.
#[inline(always)]
unsafe fn load_rows<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    from: *const f32,
    rows: &[Row; R],
) -> Accumulators<P, R, V> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut floats = [[P::Sums::splat(0.0); V]; R];
        for i in 0..R {
            for v in 0..V {
                floats[i][v] = load::<P, WHOLE>(block, from.add(rows[i].c as usize), v);
            }
        }
        floats
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

/// Writes a tile's results, of which none is -0: then it does not show which products with zeros were taken.
#[inline(always)]
pub(super) unsafe fn finish<P: Products, const R: usize, const V: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    rows: &[Row; R],
    acc: &Accumulators<P, R, V>,
) {
    let mut results = *acc;
    // SAFETY: the block's columns are readable and writable by the caller's promise; no lane, no access.
    unsafe {
        match block.finish {
            Finish::Keep => add_zero::<P, R, V>(&mut results),
            Finish::Relu => gate_all::<P, R, V>(acc, &mut results),
            Finish::Gate(gate) => {
                add_zero::<P, R, V>(&mut results);
                gate_all::<P, R, V>(&load_rows::<P, R, V, WHOLE>(block, gate, rows), &mut results);
            }
        }
        for i in 0..R {
            for v in 0..V {
                let to = block.c.add(rows[i].c as usize + v * P::Sums::LANES);
                match lanes::<P>(block, v) {
                    _ if WHOLE => P::Sums::store(to, results[i][v]),
                    0 => {}
                    lanes => P::Sums::store_partial(to, results[i][v], lanes),
                }
            }
        }
    }
}

/// Turns -0 to +0.
#[inline(always)]
unsafe fn add_zero<P: Products, const R: usize, const V: usize>(sums: &mut Accumulators<P, R, V>) {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: the machine has the instruction set.
            sums[i][v] = unsafe { P::Sums::add(sums[i][v], P::Sums::splat(0.0)) };
        }
    }
}

/// Sets sums to 0 where their gate is not above 0.
#[inline(always)]
unsafe fn gate_all<P: Products, const R: usize, const V: usize>(
    gates: &Accumulators<P, R, V>,
    sums: &mut Accumulators<P, R, V>,
) {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: the machine has the instruction set.
            sums[i][v] = unsafe { P::Sums::gate(gates[i][v], sums[i][v]) };
        }
    }
}

/// All products of one segment: the runs, `repeats` times.
#[inline(always)]
unsafe fn segment<P: Products, const R: usize, const V: usize>(
    block: &Block<'_, P::Element>,
    rows: &[Row; R],
    repeats: usize,
    acc: &mut Accumulators<P, R, V>,
    fetching: &mut Fetching,
) {
    let mut a_rows = [block.a; R];
    for i in 0..R {
        a_rows[i] = block.a.wrapping_add(rows[i].a as usize);
    }
    let begin = Distance { a: 0, b: 0 };
    // SAFETY: operands are readable by the caller's promise.
    unsafe {
        if let Some(run) = block.stretch() {
            let mut at = begin.of(&run, block);
            let mut left = repeats * run.depth as usize;
            let piece = if block.ahead.is_some() { PIECE } else { left };
            while left > 0 {
                fetching.some();
                let some = left.min(piece);
                products::<P, R, V>(block, &a_rows, &mut at, some, acc);
                left -= some;
            }
            return;
        }
        let mut begin = begin;
        for _ in 0..repeats {
            for run in block.runs {
                products::<P, R, V>(block, &a_rows, &mut begin.of(run, block), run.depth as usize, acc);
            }
            begin.a += block.a_repeat as isize;
            begin.b += (block.b_repeat * block.b_stride) as isize;
        }
    }
}

/// The register-critical loop: `depth` products, added to `R` x `V` accumulators.
#[inline(always)]
unsafe fn products<P: Products, const R: usize, const V: usize>(
    block: &Block<'_, P::Element>,
    a_rows: &[*const P::Element; R],
    at: &mut Distance,
    depth: usize,
    acc: &mut Accumulators<P, R, V>,
) {
    repeat!(depth, P::Sums::UNROLLED[V - 1], {
        // SAFETY: operands are readable by the caller's promise.
        unsafe { product::<P, R, V>(a_rows, block.b, *at, acc) }
        at.advance::<P, V>(block);
    });
}

/// How far operands are from the first ones, in elements.
#[derive(Clone, Copy)]
pub(super) struct Distance {
    pub(super) a: isize,
    pub(super) b: isize,
}

impl Distance {
    /// The operands of a run's first product.
    #[inline(always)]
    fn of<E>(self, run: &Run, block: &Block<'_, E>) -> Self {
        Self { a: self.a + run.a as isize, b: self.b + (run.b as usize * block.b_stride) as isize }
    }

    /// One product further, in a tile that is `V` vectors wide.
    #[inline(always)]
    pub(super) fn advance<P: Products, const V: usize>(&mut self, block: &Block<'_, P::Element>) {
        self.a += block.a_step as isize;
        self.b += block.b_stride as isize;
        if P::Sums::UNROLLED[V - 1] > 1 {
            *self = Self { a: opaque(self.a), b: opaque(self.b) };
        }
    }
}

/// The same distance, about which the compiler knows nothing. Otherwise it would compute the addresses of all operands of an
/// unrolled loop before the loop, and has not registers enough for them.
#[inline(always)]
fn opaque(mut distance: isize) -> isize {
    // SAFETY: no instruction at all.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) distance, options(pure, nomem, nostack, preserves_flags));
    }
    distance
}

/// One product of each output.
#[inline(always)]
pub(super) unsafe fn product<P: Products, const R: usize, const V: usize>(
    a_rows: &[*const P::Element; R],
    b: *const P::Element,
    at: Distance,
    acc: &mut Accumulators<P, R, V>,
) {
    let (a, b) = (at.a, b.wrapping_offset(at.b));
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
