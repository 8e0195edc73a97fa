//! Tiles of several segments: sums of their own, added as a perfect binary tree while they are in registers.
//!
//! What segments cost beside their products decides how fast small leaves are, and most of it is that sums wait in
//! memory for their siblings. Where stores are slow, two segments are taken at a time, each with half of the registers:
//! their sums are added where they are, and half as many wait. Where loads are the bottleneck, one is, with all registers:
//! then an operand that was loaded meets twice as many others.
#![expect(
    clippy::needless_range_loop,
    reason = "counted loops over the const sizes are what the compiler unrolls; iterators over the same arrays it does not always"
)]

use std::mem::MaybeUninit;

use super::tile::{Accumulators, Distance, Sums, finish, load_sums, product, repeat, store_sums};
use super::{Block, MAX_LEVELS, Row};
use crate::kernel::ahead::Fetching;
use crate::kernel::bf16;
use crate::kernel::isa::Isa;
use crate::kernel::products::{Products, Vector};
use crate::kernel::simd::Simd;

/// Tiles that go through a segment, or a pair of them, one after the other, while its rows of the second operand are in the L1
/// cache.
const TOGETHER: usize = 4;

/// Floats of the largest tile: 6 rows of 64 columns.
const TILE: usize = 384;

/// Sums that wait: those of complete subtrees, the largest first, none of them under another one.
///
/// They lie side by side, whatever the tile's size: with gaps, they would compete for the same sets of the L1 cache.
#[repr(align(64))]
struct Stack(MaybeUninit<[f32; MAX_LEVELS * TOGETHER * TILE]>);

impl Stack {
    /// The sums of a level and tile.
    #[inline(always)]
    fn place<P: Products, const R: usize, const V: usize>(&mut self, level: usize, tile: usize) -> *mut f32 {
        const { assert!(R * V * P::Sums::LANES <= TILE, "a tile that the stack has room for") }
        self.0.as_mut_ptr().cast::<f32>().wrapping_add((level * TOGETHER + tile) * (R * V * P::Sums::LANES))
    }
}

/// Where operands of some products begin.
#[derive(Clone, Copy)]
struct Operands<E> {
    a: *const E,
    b: *const E,
}

impl<E> Operands<E> {
    /// Behind so many products.
    #[inline(always)]
    fn after(self, products: usize, block: &Block<'_, E>) -> Self {
        let Self { a, b } = self;
        Self { a: a.wrapping_add(products * block.a_step), b: b.wrapping_add(products * block.b_stride) }
    }

    /// Where the rows of a tile find their operands, which adjoin.
    #[inline(always)]
    fn rows<const R: usize>(&self) -> [*const E; R] {
        let mut rows = [self.a; R];
        for i in 1..R {
            rows[i] = self.a.wrapping_add(i);
        }
        rows
    }
}

/// All tiles of a height. Returns whether all outputs are known to be finite.
///
/// # Safety
/// The tiles' rows belong to the block, for which the caller promises what [`super::run`] asks for.
#[inline(always)]
pub(super) unsafe fn all<P: Products, const R: usize, const V: usize, const S: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    tiles: &[[Row; R]],
    fetching: &mut Fetching,
) -> bool {
    let mut finite = true;
    for tiles in tiles.chunks(TOGETHER) {
        // SAFETY: the caller's promise.
        finite &= unsafe { some::<P, R, V, S, WHOLE>(block, tiles, fetching) };
    }
    finite
}

/// At most [`TOGETHER`] tiles, which take `S` segments at a time, 1 or 2: a step.
///
/// Step `k` completes as many larger subtrees as `k` has ones at its end in binary: then their left halves wait on the
/// stack, the last one on top.
///
/// Returns whether all sums are known to be finite. Lanes that hold no column may say that they are not.
#[inline(always)]
unsafe fn some<P: Products, const R: usize, const V: usize, const S: usize, const WHOLE: bool>(
    block: &Block<'_, P::Element>,
    tiles: &[[Row; R]],
    fetching: &mut Fetching,
) -> bool {
    debug_assert!(tiles.iter().all(|rows| rows.windows(2).all(|rows| rows[1].a == rows[0].a + 1)), "operands adjoin");
    let (steps, _) = block.segments.as_chunks::<S>();
    let run = block.runs[0];
    let mut stack = Stack(MaybeUninit::uninit());
    let mut begin = Operands {
        a: block.a.wrapping_offset(run.a as isize),
        b: block.b.wrapping_add(run.b as usize * block.b_stride),
    };
    let mut waiting = 0;
    // SAFETY: sums on the stack were stored by the steps before; the rest is the caller's promise.
    unsafe {
        // Stays 0 as long as finite sums are multiplied by 0 and added.
        let mut zeros = P::Sums::splat(0.0);
        for (k, repeats) in steps.iter().enumerate() {
            let below = waiting - k.trailing_ones() as usize;
            let depths = repeats.map(|repeats| repeats * run.depth as usize);
            for (tile, rows) in tiles.iter().enumerate() {
                fetching.some();
                let begin = Operands { a: begin.a.wrapping_add(rows[0].a as usize), ..begin };
                let mut sum = match depths[..] {
                    [left, right] => {
                        let [left, right] = pair::<P, R, V>(block, begin, [left, right]);
                        match block.rounded_on {
                            None => add::<P, R, V>(&left, &right),
                            Some(isa) => {
                                let (left, right) = (round::<P, R, V>(isa, &left), round::<P, R, V>(isa, &right));
                                rounded_sum::<P, R, V>(isa, &left, &right)
                            }
                        }
                    }
                    _ => {
                        let sums = segment::<P, R, V>(block, begin, depths[0]);
                        block.rounded_on.map_or(sums, |isa| round::<P, R, V>(isa, &sums))
                    }
                };
                for level in (below..waiting).rev() {
                    let left = load_sums::<P, R, V>(stack.place::<P, R, V>(level, tile));
                    sum = match block.rounded_on {
                        None => add::<P, R, V>(&left, &sum),
                        Some(isa) => rounded_sum::<P, R, V>(isa, &left, &sum),
                    };
                }
                if k + 1 < steps.len() {
                    store_sums::<P, R, V>(stack.place::<P, R, V>(below, tile), &sum);
                } else {
                    zeros = add_zeros::<P, R, V>(&sum, zeros);
                    finish::<P, R, V, WHOLE>(block, rows, &sum);
                }
            }
            waiting = below + 1;
            begin = begin.after(depths.iter().sum(), block);
        }
        let mut lanes = Sums::UNINIT;
        P::Sums::store(lanes.vector::<P>(0), zeros);
        (0..P::Sums::LANES).all(|lane| *lanes.vector::<P>(0).add(lane) == 0.0)
    }
}

/// The sums of one segment.
#[inline(always)]
unsafe fn segment<P: Products, const R: usize, const V: usize>(
    block: &Block<'_, P::Element>,
    begin: Operands<P::Element>,
    depth: usize,
) -> Accumulators<P, R, V> {
    let rows = begin.rows();
    let mut at = Distance { a: 0, b: 0 };
    // SAFETY: operands are readable by the caller's promise.
    unsafe {
        let mut sums = [[P::Sums::splat(0.0); V]; R];
        repeat!(depth, P::Sums::UNROLLED[V - 1], {
            product::<P, R, V>(&rows, begin.b, at, &mut sums);
            at.advance::<P, V>(block);
        });
        sums
    }
}

/// The sums of two segments, one after the other in memory. Products of both take turns; those that one of them has more
/// come last.
#[inline(always)]
unsafe fn pair<P: Products, const R: usize, const V: usize>(
    block: &Block<'_, P::Element>,
    begin: Operands<P::Element>,
    depths: [usize; 2],
) -> [Accumulators<P, R, V>; 2] {
    let (first, second) = (begin, begin.after(depths[0], block));
    let (first_rows, second_rows) = (first.rows(), second.rows());
    let both = depths[0].min(depths[1]);
    let mut at = Distance { a: 0, b: 0 };
    // SAFETY: operands are readable by the caller's promise.
    unsafe {
        let zeros = [[P::Sums::splat(0.0); V]; R];
        let (mut left, mut right) = (zeros, zeros);
        repeat!(both, P::Sums::UNROLLED[V - 1].div_ceil(2), {
            product::<P, R, V>(&first_rows, first.b, at, &mut left);
            product::<P, R, V>(&second_rows, second.b, at, &mut right);
            at.advance::<P, V>(block);
        });
        let mut more = at;
        for _ in both..depths[0] {
            product::<P, R, V>(&first_rows, first.b, more, &mut left);
            more.advance::<P, V>(block);
        }
        for _ in both..depths[1] {
            product::<P, R, V>(&second_rows, second.b, at, &mut right);
            at.advance::<P, V>(block);
        }
        [left, right]
    }
}

#[inline(always)]
unsafe fn add<P: Products, const R: usize, const V: usize>(
    left: &Accumulators<P, R, V>,
    right: &Accumulators<P, R, V>,
) -> Accumulators<P, R, V> {
    let mut sum = *left;
    for i in 0..R {
        for v in 0..V {
            // SAFETY: the machine has the instruction set.
            sum[i][v] = unsafe { P::Sums::add(left[i][v], right[i][v]) };
        }
    }
    sum
}

/// Rounds the sum of two rounded sums.
#[inline(always)]
unsafe fn rounded_sum<P: Products, const R: usize, const V: usize>(
    isa: Isa,
    left: &Accumulators<P, R, V>,
    right: &Accumulators<P, R, V>,
) -> Accumulators<P, R, V> {
    // SAFETY: the machine has the instruction set.
    unsafe { round::<P, R, V>(isa, &add::<P, R, V>(left, right)) }
}

/// Rounds each sum to bfloat16.
#[inline(always)]
unsafe fn round<P: Products, const R: usize, const V: usize>(
    isa: Isa,
    sums: &Accumulators<P, R, V>,
) -> Accumulators<P, R, V> {
    let mut memory = Sums::UNINIT;
    let place = memory.vector::<P>(0);
    // SAFETY: what is read was stored.
    unsafe {
        store_sums::<P, R, V>(place, sums);
        // A call: what rounding needs would take registers from the loop over the products.
        bf16::round_all(isa, std::slice::from_raw_parts_mut(place, R * V * P::Sums::LANES));
        load_sums::<P, R, V>(place)
    }
}

/// Adds every sum times 0.
#[inline(always)]
unsafe fn add_zeros<P: Products, const R: usize, const V: usize>(
    sums: &Accumulators<P, R, V>,
    mut zeros: Vector<P>,
) -> Vector<P> {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: the machine has the instruction set.
            zeros = unsafe { P::Sums::multiply_add(sums[i][v], P::Sums::splat(0.0), zeros) };
        }
    }
    zeros
}
