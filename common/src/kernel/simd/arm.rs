//! Vectors of 64-bit ARM.

use std::arch::aarch64::*;

use super::Simd;

/// NEON: four lanes.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Neon;

// SAFETY (every block below): NEON is part of aarch64; pointers are valid for the lanes named.
impl Simd for Neon {
    const LANES: usize = 4;
    const UNROLLED: [usize; 4] = [1; 4];
    const SUMS: usize = 24;
    type Vector = float32x4_t;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, lanes: usize) -> float32x4_t {
        let mut buffer = [0.0f32; 4];
        // SAFETY: see above; only the first `lanes` floats are read.
        unsafe {
            std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), lanes);
            vld1q_f32(buffer.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: float32x4_t) {
        // SAFETY: see above.
        unsafe { vst1q_f32(to, vector) }
    }

    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, vector: float32x4_t, lanes: usize) {
        let mut buffer = [0.0f32; 4];
        // SAFETY: see above; only the first `lanes` floats are written.
        unsafe {
            vst1q_f32(buffer.as_mut_ptr(), vector);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to, lanes);
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    unsafe fn gate(gate: float32x4_t, value: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe {
            let closed = vcleq_f32(gate, vdupq_n_f32(0.0));
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), closed))
        }
    }

    #[inline(always)]
    unsafe fn clear_below(limit: f32, value: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe {
            let small = vcltq_f32(vabsq_f32(value), vdupq_n_f32(limit));
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), small))
        }
    }

    #[inline(always)]
    unsafe fn upper_half(bits: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(bits), vdupq_n_u32(0xffff_0000))) }
    }

    #[inline(always)]
    unsafe fn lower_half(bits: float32x4_t) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(bits))) }
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, [height, width]: [usize; 2], to: *mut f32, to_stride: usize) {
        // Reading every fourth float of 16 is a transpose.
        let mut rows = [0.0f32; 16];
        // SAFETY: see above; neither rows nor lanes beyond the matrix are accessed.
        unsafe {
            for i in 0..height {
                vst1q_f32(rows.as_mut_ptr().add(4 * i), Self::load_partial(from.add(i * stride), width));
            }
            let columns = vld4q_f32(rows.as_ptr());
            for (i, column) in [columns.0, columns.1, columns.2, columns.3].into_iter().enumerate().take(width) {
                Self::store_partial(to.add(i * to_stride), column, height);
            }
        }
    }
}
