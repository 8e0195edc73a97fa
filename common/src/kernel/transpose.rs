//! Transposes of matrices, square block by square block in registers.

use super::isa::{Isa, Kind};
use super::simd::{Scalar, Simd};

/// Where a matrix lies in a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixShape {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
    /// From the start of one row to the start of the next, at least `columns`.
    pub stride: usize,
}

impl MatrixShape {
    /// Rows that follow each other without gaps.
    pub fn dense(rows: usize, columns: usize) -> Self {
        Self { rows, columns, stride: columns }
    }
}

/// Writes the transpose of `from` to `to`, whose rows are `to_stride` apart and have `shape.rows` elements.
///
/// # Panics
/// When a slice is too short.
pub fn transpose(isa: Isa, from: &[f32], shape: MatrixShape, to: &mut [f32], to_stride: usize) {
    let MatrixShape { rows, columns, stride } = shape;
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= stride && rows <= to_stride, "rows do not overlap");
    assert!(from.len() >= (rows - 1) * stride + columns, "matrix too short");
    assert!(to.len() >= (columns - 1) * to_stride + rows, "transpose too short");
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    // SAFETY: both matrices lie inside their slices; a value of `Isa` exists only for instruction sets that were
    // detected.
    unsafe {
        match isa.kind() {
            Kind::Scalar => blocks::<Scalar>(from, shape, to, to_stride),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2(from, shape, to, to_stride),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512(from, shape, to, to_stride),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => blocks::<super::simd::arm::Neon>(from, shape, to, to_stride),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(from: *const f32, shape: MatrixShape, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { blocks::<super::simd::x86::Avx2>(from, shape, to, to_stride) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(from: *const f32, shape: MatrixShape, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { blocks::<super::simd::x86::Avx512>(from, shape, to, to_stride) }
}

/// Whole blocks by vectors, the edges element by element.
///
/// # Safety
/// `from` must hold a matrix of the shape, `to` its transpose with rows that are `to_stride` apart.
#[inline(always)]
unsafe fn blocks<S: Simd>(from: *const f32, shape: MatrixShape, to: *mut f32, to_stride: usize) {
    let MatrixShape { rows, columns, stride } = shape;
    let (whole_rows, whole_columns) = (rows / S::LANES * S::LANES, columns / S::LANES * S::LANES);
    // SAFETY: every index is below the shape's sizes.
    unsafe {
        let edge = |row: usize, column: usize| *to.add(column * to_stride + row) = *from.add(row * stride + column);
        for top in (0..whole_rows).step_by(S::LANES) {
            for left in (0..whole_columns).step_by(S::LANES) {
                S::transpose(from.add(top * stride + left), stride, to.add(left * to_stride + top), to_stride);
            }
            for row in top..top + S::LANES {
                (whole_columns..columns).for_each(|column| edge(row, column));
            }
        }
        for row in whole_rows..rows {
            (0..columns).for_each(|column| edge(row, column));
        }
    }
}
