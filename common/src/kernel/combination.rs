//! Sums of a few rows of a matrix, each times a factor of its own: products with what is not 0, where most is 0.
//!
//! The microkernel multiplies everything by everything. Where one operand is mostly zeros, it is faster to list what is not 0
//! ([`Lists`]), and to go through the list with sums in registers. Every sum is a chain of fused multiply-adds in the order of
//! its list; vectors run across the rows.

pub(super) mod leaves;

use super::isa::{Isa, Kind};
use super::simd::{Scalar, Simd};

/// Stretches that are summed together, with one look at a list: the rows of the usual window.
const TOGETHER: usize = 3;

/// Vectors of a stretch that are summed at a time, at most.
const MAX_VECTORS: usize = 12;

/// Elements that are not 0, list by list.
#[derive(Clone, Copy)]
pub(super) struct Lists<'a> {
    /// Where each list ends; it starts where the one before ends.
    pub(super) ends: &'a [u32],
    /// The row of each element, or where it begins, in floats.
    pub(super) rows: &'a [u32],
    /// The elements.
    pub(super) factors: &'a [f32],
}

impl<'a> Lists<'a> {
    /// Lists that were made in that memory: see [`ListsMut`].
    pub(super) fn in_memory(memory: &'a [f32], ends: &'a [u32]) -> Self {
        let (rows, factors) = memory.split_at(memory.len() / 2);
        Self { ends, rows: bytemuck::cast_slice(rows), factors }
    }
}

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
pub(super) struct Combinations<'a> {
    pub(super) lists: Lists<'a>,
    /// Where the sums of each list begin, in floats.
    pub(super) targets: &'a [u32],
    pub(super) matrix: *const f32,
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
pub(super) unsafe fn run(isa: Isa, combinations: &Combinations<'_>) {
    match isa.kind() {
        // SAFETY: the caller's promises are the callee's.
        Kind::Scalar => unsafe { all::<Scalar>(combinations) },
        // SAFETY: as above, and a value of `Isa` exists only for instruction sets that were detected.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(combinations) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(combinations) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { all::<super::simd::arm::Neon>(combinations) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(combinations: &Combinations<'_>) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<super::simd::x86::Avx2>(combinations) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(combinations: &Combinations<'_>) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { all::<super::simd::x86::Avx512>(combinations) }
}

/// Stretches by threes and one by one.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn all<S: Simd>(all: &Combinations<'_>) {
    let by_threes = all.stretches / TOGETHER * TOGETHER;
    for stretch in (0..by_threes).step_by(TOGETHER) {
        // SAFETY: the stretches are the combinations'.
        unsafe { columns::<S, TOGETHER>(all, stretch) }
    }
    for stretch in by_threes..all.stretches {
        // SAFETY: as above.
        unsafe { columns::<S, 1>(all, stretch) }
    }
}

/// `ROWS` stretches from one on, as many vectors of columns at a time as registers hold, evenly; then what is no whole vector.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
unsafe fn columns<S: Simd, const ROWS: usize>(all: &Combinations<'_>, stretch: usize) {
    let (matrix, sums) =
        (all.matrix.wrapping_add(stretch * all.matrix_step), all.sums.wrapping_add(stretch * all.sums_step));
    let vectors = all.len / S::LANES;
    let tiles = vectors.div_ceil((S::SUMS / ROWS).min(MAX_VECTORS).min(all.tile.div_ceil(S::LANES)));
    for tile in 0..tiles {
        let (first, end) = (vectors * tile / tiles, vectors * (tile + 1) / tiles);
        let place = Tile { matrix: matrix.wrapping_add(first * S::LANES), sums: sums.wrapping_add(first * S::LANES) };
        // SAFETY: these vectors are inside the stretch.
        unsafe {
            match end - first {
                1 => place.add::<S, ROWS, 1>(all),
                2 => place.add::<S, ROWS, 2>(all),
                3 => place.add::<S, ROWS, 3>(all),
                4 => place.add::<S, ROWS, 4>(all),
                5 if ROWS * 5 <= S::SUMS => place.add::<S, ROWS, 5>(all),
                6 if ROWS * 6 <= S::SUMS => place.add::<S, ROWS, 6>(all),
                7 if ROWS * 7 <= S::SUMS => place.add::<S, ROWS, 7>(all),
                8 if ROWS * 8 <= S::SUMS => place.add::<S, ROWS, 8>(all),
                9 if ROWS * 9 <= S::SUMS => place.add::<S, ROWS, 9>(all),
                10 if ROWS * 10 <= S::SUMS => place.add::<S, ROWS, 10>(all),
                11 if ROWS * 11 <= S::SUMS => place.add::<S, ROWS, 11>(all),
                12 if ROWS * 12 <= S::SUMS => place.add::<S, ROWS, 12>(all),
                _ => unreachable!("a tile has its sums in registers"),
            }
        }
    }
    let rest = all.len % S::LANES;
    if rest > 0 {
        let place =
            Tile { matrix: matrix.wrapping_add(vectors * S::LANES), sums: sums.wrapping_add(vectors * S::LANES) };
        // SAFETY: the last columns of the stretch.
        unsafe { place.add_partial::<S, ROWS>(all, rest) }
    }
}

/// Some columns of some stretches.
#[derive(Clone, Copy)]
struct Tile {
    matrix: *const f32,
    sums: *mut f32,
}

impl Tile {
    /// Adds up `VECTORS` vectors of columns of each of `ROWS` stretches, for all lists.
    ///
    /// # Safety
    /// As for [`run`], for these columns.
    #[inline(always)]
    unsafe fn add<S: Simd, const ROWS: usize, const VECTORS: usize>(self, all: &Combinations<'_>) {
        let Lists { ends, rows, factors } = all.lists;
        let mut i = 0;
        for (&end, &target) in ends.iter().zip(all.targets) {
            // SAFETY: lists and columns are the combinations'.
            unsafe {
                let sums = self.sums.add(target as usize);
                let mut tile = [[S::splat(0.0); VECTORS]; ROWS];
                for (row, tile) in tile.iter_mut().enumerate() {
                    for (vector, sum) in tile.iter_mut().enumerate() {
                        *sum = S::load(sums.add(row * all.sums_step + vector * S::LANES));
                    }
                }
                while i < end as usize {
                    let factor = S::splat(*factors.get_unchecked(i));
                    let from = self.matrix.add(*rows.get_unchecked(i) as usize);
                    for (row, tile) in tile.iter_mut().enumerate() {
                        for (vector, sum) in tile.iter_mut().enumerate() {
                            let value = S::load(from.add(row * all.matrix_step + vector * S::LANES));
                            *sum = S::multiply_add(factor, value, *sum);
                        }
                    }
                    i += 1;
                }
                for (row, tile) in tile.iter().enumerate() {
                    for (vector, sum) in tile.iter().enumerate() {
                        S::store(sums.add(row * all.sums_step + vector * S::LANES), *sum);
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
    unsafe fn add_partial<S: Simd, const ROWS: usize>(self, all: &Combinations<'_>, lanes: usize) {
        let Lists { ends, rows, factors } = all.lists;
        let mut i = 0;
        for (&end, &target) in ends.iter().zip(all.targets) {
            // SAFETY: lists and columns are the combinations'.
            unsafe {
                let sums = self.sums.add(target as usize);
                let mut tile = [S::splat(0.0); ROWS];
                for (row, sum) in tile.iter_mut().enumerate() {
                    *sum = S::load_partial(sums.add(row * all.sums_step), lanes);
                }
                while i < end as usize {
                    let factor = S::splat(*factors.get_unchecked(i));
                    let from = self.matrix.add(*rows.get_unchecked(i) as usize);
                    for (row, sum) in tile.iter_mut().enumerate() {
                        let value = S::load_partial(from.add(row * all.matrix_step), lanes);
                        *sum = S::multiply_add(factor, value, *sum);
                    }
                    i += 1;
                }
                for (row, sum) in tile.iter().enumerate() {
                    S::store_partial(sums.add(row * all.sums_step), *sum, lanes);
                }
            }
        }
    }
}

/// Lists in the making.
pub(super) struct ListsMut<'a> {
    rows: &'a mut [u32],
    factors: &'a mut [f32],
    len: usize,
}

impl<'a> ListsMut<'a> {
    /// Elements that are written behind the last one at most: a vector.
    const SLACK: usize = 16;

    /// Floats of memory for lists of so many elements together.
    pub(super) fn memory(elements: usize) -> usize {
        2 * (elements + Self::SLACK)
    }

    /// No elements yet.
    pub(super) fn new(memory: &'a mut [f32]) -> Self {
        let (rows, factors) = memory.split_at_mut(memory.len() / 2);
        Self { rows: bytemuck::cast_slice_mut(rows), factors, len: 0 }
    }

    /// Appends those of `values` that are not 0, with their rows. Returns where the list ends.
    ///
    /// # Panics
    /// When there is no room, or there are fewer rows than values.
    pub(super) fn append(&mut self, isa: Isa, values: &[f32], rows: &[u32]) -> u32 {
        assert!(rows.len() >= values.len(), "a row for each value");
        let room = self.rows.len().min(self.factors.len());
        assert!(self.len + values.len() + Self::SLACK <= room, "room for all, and slack");
        let to = (self.rows[self.len..].as_mut_ptr(), self.factors[self.len..].as_mut_ptr());
        // SAFETY: lengths were checked; a value of `Isa` exists only for instruction sets that were detected.
        self.len += unsafe {
            match isa.kind() {
                Kind::Scalar => append_nonzero::<Scalar>(values, rows.as_ptr(), to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => append_avx2(values, rows.as_ptr(), to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => append_avx512(values, rows.as_ptr(), to),
                #[cfg(target_arch = "aarch64")]
                Kind::Neon => append_nonzero::<super::simd::arm::Neon>(values, rows.as_ptr(), to),
            }
        };
        self.len as u32
    }

    /// Appends a list for each part of `values`, of `step` times so many. Writes where they end.
    ///
    /// # Panics
    /// As for [`ListsMut::append`], and when the parts are not all values.
    pub(super) fn append_parts(
        &mut self,
        isa: Isa,
        values: &[f32],
        rows: &[u32],
        (parts, step): (&[usize], usize),
        ends: &mut [u32],
    ) {
        assert_eq!(parts.iter().sum::<usize>() * step, values.len(), "parts make up the values");
        let mut at = 0;
        for (part, end) in parts.iter().zip(ends) {
            let part = at..at + part * step;
            *end = self.append(isa, &values[part.clone()], &rows[part.clone()]);
            at = part.end;
        }
    }

    /// The lists, which end there.
    pub(super) fn finish(self, ends: &'a [u32]) -> Lists<'a> {
        Lists { ends, rows: &self.rows[..self.len], factors: &self.factors[..self.len] }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn append_avx2(values: &[f32], rows: *const u32, to: (*mut u32, *mut f32)) -> usize {
    // SAFETY: the caller's promises are the callee's.
    unsafe { append_nonzero::<super::simd::x86::Avx2>(values, rows, to) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn append_avx512(values: &[f32], rows: *const u32, to: (*mut u32, *mut f32)) -> usize {
    // SAFETY: the caller's promises are the callee's.
    unsafe { append_nonzero::<super::simd::x86::Avx512>(values, rows, to) }
}

/// Writes the values that are not 0, with their rows; returns how many.
///
/// # Safety
/// There are as many rows as values, and room for as many in `to` and [`ListsMut::SLACK`] more.
#[inline(always)]
unsafe fn append_nonzero<S: Simd>(
    values: &[f32],
    rows: *const u32,
    (to_rows, to_factors): (*mut u32, *mut f32),
) -> usize {
    let mut len = 0;
    let whole = values.len() / S::LANES * S::LANES;
    // SAFETY: the caller's promises.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            len += S::keep_nonzero(values.as_ptr().add(i), rows.add(i), to_factors.add(len), to_rows.add(len));
        }
        for (i, &value) in values.iter().enumerate().skip(whole) {
            *to_factors.add(len) = value;
            *to_rows.add(len) = *rows.add(i);
            len += usize::from(value != 0.0);
        }
    }
    len
}
