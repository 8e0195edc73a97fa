//! Sums of a few rows of a matrix, each times a factor of its own: products with what is not 0, where most is 0.
//!
//! The microkernel multiplies everything by everything. Where one operand is mostly zeros, it is faster to list what is not 0
//! ([`Lists`]), and to go through the list with sums in registers. Every sum is a chain of fused multiply-adds in the order of
//! its list; vectors run across the rows. As in the microkernel, a product of pairs of bfloat16 numbers is a sum of two.

pub(super) mod leaves;
mod lists;

use super::isa::{Isa, Kind};
use super::products::{ChainElement, Products, Vector};
use super::simd::{MAX_LANES, Scalar, Simd};

pub(super) use lists::{Lists, ListsMut};

/// Stretches that are summed together, with one look at a list: the rows of the usual window.
const TOGETHER: usize = 3;

/// Vectors of a stretch that are summed at a time, at most.
const MAX_VECTORS: usize = 12;

/// Evaluates an expression with a number of vectors as a constant: 1 to [`MAX_VECTORS`], as far as registers hold so many rows of
/// them.
macro_rules! with_vectors {
    ($count:expr, $rows:expr, $registers:expr, $constant:ident => $value:expr) => {
        with_vectors!(1 2 3 4 5 6 7 8 9 10 11 12; $count, $rows, $registers, $constant => $value)
    };
    ($($number:literal)*; $count:expr, $rows:expr, $registers:expr, $constant:ident => $value:expr) => {
        match $count {
            $($number if $rows * $number <= $registers => {
                const $constant: usize = $number;
                $value
            })*
            count => unreachable!("{count} vectors of a tile whose sums are in registers"),
        }
    };
}
use with_vectors;

/// Whether stretches of that length are summed by threes, whole: if targets overlap, what is added to a sum then comes in the
/// order of the lists. Else parts of stretches are summed one after the other, all lists for each.
pub(super) fn sums_whole_threes(isa: Isa, len: usize) -> bool {
    fn fits<S: Simd>(len: usize) -> bool {
        len.is_multiple_of(S::LANES) && len / S::LANES <= (S::SUMS / TOGETHER).min(MAX_VECTORS)
    }
    match isa.kind() {
        Kind::Scalar => fits::<Scalar>(len),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => fits::<super::simd::x86::Avx2>(len),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => fits::<super::simd::x86::Avx512>(len),
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => fits::<super::simd::arm::Neon>(len),
    }
}

/// For every list: `sums[target + s * sums_step + j] += factor * matrix[row + s * matrix_step + j]`, for the elements of the
/// list in their order, all stretches `s < stretches`, and `j < len`.
///
/// Rows, steps and lengths are counted in elements of the matrix, or sums. (Public, as what the sealed [`ChainElement`] names must be.)
pub struct Combinations<'a, E> {
    pub(super) lists: Lists<'a>,
    /// Where the sums of each list begin, in floats.
    pub(super) targets: &'a [u32],
    pub(super) matrix: *const E,
    pub(super) sums: *mut f32,
    pub(super) len: usize,
    /// Floats of a stretch that are summed at a time, at most; not 0.
    pub(super) tile: usize,
    pub(super) stretches: usize,
    pub(super) matrix_step: usize,
    pub(super) sums_step: usize,
}

/// Adds up combinations.
///
/// # Safety
/// There is a target for each list, ends ascend and the last one is no more than there are rows and factors; every element
/// that is named above is readable, those of `sums` are writable by this call alone, and no element of `matrix` is among them.
pub(super) unsafe fn run<E: ChainElement>(isa: Isa, combinations: &Combinations<'_, E>) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { E::combine(isa, combinations) }
}

/// What [`ChainElement::combine`] does.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(super) unsafe fn combine<E: ChainElement>(isa: Isa, combinations: &Combinations<'_, E>) {
    match isa.kind() {
        // SAFETY: the caller's promises are the callee's.
        Kind::Scalar => unsafe { all::<E::On<Scalar>>(combinations) },
        // SAFETY: as above, and a value of `Isa` exists only for instruction sets that were detected.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(combinations) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 if E::has_instruction() => unsafe { avx512_by_instruction(combinations) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(combinations) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { all::<E::On<super::simd::arm::Neon>>(combinations) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<E: ChainElement>(combinations: &Combinations<'_, E>) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<E::On<super::simd::x86::Avx2>>(combinations) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512<E: ChainElement>(combinations: &Combinations<'_, E>) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<E::On<super::simd::x86::Avx512>>(combinations) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn avx512_by_instruction<E: ChainElement>(combinations: &Combinations<'_, E>) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<E::ByInstruction>(combinations) }
}

/// Stretches by threes and one by one.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn all<P: Products>(all: &Combinations<'_, P::Element>) {
    let by_threes = all.stretches / TOGETHER * TOGETHER;
    for stretch in (0..by_threes).step_by(TOGETHER) {
        // SAFETY: the stretches are the combinations'.
        unsafe { columns::<P, TOGETHER>(all, stretch) }
    }
    for stretch in by_threes..all.stretches {
        // SAFETY: as above.
        unsafe { columns::<P, 1>(all, stretch) }
    }
}

/// `ROWS` stretches from one on, as many vectors of columns at a time as registers hold, evenly; then what is no whole vector.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn columns<P: Products, const ROWS: usize>(all: &Combinations<'_, P::Element>, stretch: usize) {
    let (lanes, registers) = (P::Sums::LANES, P::Sums::SUMS);
    let begin = Tile {
        matrix: all.matrix.wrapping_add(stretch * all.matrix_step),
        sums: all.sums.wrapping_add(stretch * all.sums_step),
    };
    let vectors = all.len / lanes;
    let tiles = vectors.div_ceil((registers / ROWS).min(MAX_VECTORS).min(all.tile.div_ceil(lanes)));
    for tile in 0..tiles {
        let (first, end) = (vectors * tile / tiles, vectors * (tile + 1) / tiles);
        let tile = begin.after(first * lanes);
        // SAFETY: these vectors are inside the stretch.
        unsafe {
            with_vectors!(end - first, ROWS, registers, VECTORS => tile.add::<P, ROWS, VECTORS>(all));
        }
    }
    let rest = all.len % lanes;
    if rest > 0 {
        // SAFETY: the last columns of the stretch.
        unsafe { begin.after(vectors * lanes).add_partial::<P, ROWS>(all, rest) }
    }
}

/// Some columns of some stretches.
#[derive(Clone, Copy)]
struct Tile<E> {
    matrix: *const E,
    sums: *mut f32,
}

impl<E: Copy> Tile<E> {
    /// The columns behind so many others.
    #[inline(always)]
    fn after(self, columns: usize) -> Self {
        Self { matrix: self.matrix.wrapping_add(columns), sums: self.sums.wrapping_add(columns) }
    }

    /// Adds up `VECTORS` vectors of columns of each of `ROWS` stretches, for all lists.
    ///
    /// # Safety
    /// As for [`run`], for these columns.
    #[inline(always)]
    unsafe fn add<P: Products<Element = E>, const ROWS: usize, const VECTORS: usize>(self, all: &Combinations<'_, E>) {
        let Lists { ends, rows, factors } = all.lists;
        let mut i = 0;
        for (&end, &target) in ends.iter().zip(all.targets) {
            // SAFETY: lists and columns are the combinations'.
            unsafe {
                let sums = self.sums.add(target as usize);
                let mut tile = [[P::Sums::splat(0.0); VECTORS]; ROWS];
                for (row, tile) in tile.iter_mut().enumerate() {
                    for (vector, sum) in tile.iter_mut().enumerate() {
                        *sum = P::Sums::load(sums.add(row * all.sums_step + vector * P::Sums::LANES));
                    }
                }
                while i < end as usize {
                    let factor = *factors.as_ptr().cast::<E>().add(i);
                    let from = self.matrix.add(*rows.get_unchecked(i) as usize);
                    product::<P, ROWS, VECTORS, 0>(factor, from, all.matrix_step, &mut tile);
                    if P::PARTS > 1 {
                        product::<P, ROWS, VECTORS, 1>(factor, from, all.matrix_step, &mut tile);
                    }
                    i += 1;
                }
                for (row, tile) in tile.iter().enumerate() {
                    for (vector, sum) in tile.iter().enumerate() {
                        P::Sums::store(sums.add(row * all.sums_step + vector * P::Sums::LANES), *sum);
                    }
                }
            }
        }
    }

    /// The same for the first `lanes` columns, which are less than a vector.
    ///
    /// # Safety
    /// As for [`run`], for these columns.
    #[inline(always)]
    unsafe fn add_partial<P: Products<Element = E>, const ROWS: usize>(self, all: &Combinations<'_, E>, lanes: usize) {
        let Lists { ends, rows, factors } = all.lists;
        let mut i = 0;
        for (&end, &target) in ends.iter().zip(all.targets) {
            // SAFETY: lists and columns are the combinations'. An element is a word, as a float is: whatever it is, a vector of
            // which it is loaded as such.
            unsafe {
                let sums = self.sums.add(target as usize);
                let mut tile = [[P::Sums::splat(0.0); 1]; ROWS];
                for (row, [sum]) in tile.iter_mut().enumerate() {
                    *sum = P::Sums::load_partial(sums.add(row * all.sums_step), lanes);
                }
                while i < end as usize {
                    let factor = *factors.as_ptr().cast::<E>().add(i);
                    let from = self.matrix.add(*rows.get_unchecked(i) as usize);
                    let mut whole = [[0.0f32; MAX_LANES]; ROWS];
                    for (row, whole) in whole.iter_mut().enumerate() {
                        let from = from.add(row * all.matrix_step).cast();
                        P::Sums::store(whole.as_mut_ptr(), P::Sums::load_partial(from, lanes));
                    }
                    let from = whole.as_ptr().cast();
                    product::<P, ROWS, 1, 0>(factor, from, MAX_LANES, &mut tile);
                    if P::PARTS > 1 {
                        product::<P, ROWS, 1, 1>(factor, from, MAX_LANES, &mut tile);
                    }
                    i += 1;
                }
                for (row, [sum]) in tile.iter().enumerate() {
                    P::Sums::store_partial(sums.add(row * all.sums_step), *sum, lanes);
                }
            }
        }
    }
}

/// Part `PART` of the products of an element with `VECTORS` vectors of each of `ROWS` stretches.
///
/// # Safety
/// These vectors are readable, and the machine has the instruction set.
#[inline(always)]
unsafe fn product<P: Products, const ROWS: usize, const VECTORS: usize, const PART: usize>(
    factor: P::Element,
    from: *const P::Element,
    step: usize,
    tile: &mut [[Vector<P>; VECTORS]; ROWS],
) {
    // SAFETY: the caller's promises.
    unsafe {
        let factor = P::splat::<PART>(factor);
        for (row, tile) in tile.iter_mut().enumerate() {
            for (vector, sum) in tile.iter_mut().enumerate() {
                let value = P::load::<PART>(from.add(row * step + vector * P::Sums::LANES));
                *sum = P::multiply_add(factor, value, *sum);
            }
        }
    }
}
