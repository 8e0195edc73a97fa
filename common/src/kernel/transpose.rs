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

/// Blocks by vectors, also at the edges.
///
/// # Safety
/// `from` must hold a matrix of the shape, `to` its transpose with rows that are `to_stride` apart.
#[inline(always)]
unsafe fn blocks<S: Simd>(from: *const f32, shape: MatrixShape, to: *mut f32, to_stride: usize) {
    let MatrixShape { rows, columns, stride } = shape;
    // SAFETY: every block lies inside the shape.
    unsafe {
        for top in (0..rows).step_by(S::LANES) {
            for left in (0..columns).step_by(S::LANES) {
                let (from, to) = (from.add(top * stride + left), to.add(left * to_stride + top));
                match [S::LANES.min(rows - top), S::LANES.min(columns - left)] {
                    // What the compiler knows needs no masks.
                    whole if whole == [S::LANES; 2] => S::transpose(from, stride, [S::LANES; 2], to, to_stride),
                    part => S::transpose(from, stride, part, to, to_stride),
                }
            }
        }
    }
}
