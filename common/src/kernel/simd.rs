//! The few vector primitives that the microkernel is written against, for each instruction set.

/// Vectors of `LANES` floats. Lanes never meet: every operation is elementwise, so results do not depend on `LANES`.
///
/// # Safety
/// All functions require that the machine has the instruction set, and that pointers are valid for the lanes named.
pub(super) trait Simd: Copy {
    /// Floats in a vector.
    const LANES: usize;
    /// A vector.
    type Vector: Copy;

    /// Reads `LANES` floats.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// Reads the first `lanes` (at most `LANES`) floats; the other lanes are 0.
    unsafe fn load_partial(from: *const f32, lanes: usize) -> Self::Vector;
    /// Writes `LANES` floats.
    unsafe fn store(to: *mut f32, vector: Self::Vector);
    /// Writes the first `lanes` (at most `LANES`) floats.
    unsafe fn store_partial(to: *mut f32, vector: Self::Vector, lanes: usize);
    /// The same float in every lane.
    unsafe fn splat(value: f32) -> Self::Vector;
    /// `a * b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Per lane: 0 where `gate <= 0`, else `value`. A NaN gate lets the value through, so that NaN stays visible.
    unsafe fn gate(gate: Self::Vector, value: Self::Vector) -> Self::Vector;
}

/// The specification: eight lanes of `f32::mul_add`.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

// SAFETY (whole impl): pointers are valid for the lanes named, by the trait's contract; no special instructions.
impl Simd for Scalar {
    const LANES: usize = 8;
    type Vector = [f32; 8];

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: valid for 8 floats by the trait's contract.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, lanes: usize) -> [f32; 8] {
        // SAFETY: only the first `lanes` floats are read.
        std::array::from_fn(|i| if i < lanes { unsafe { *from.add(i) } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: [f32; 8]) {
        // SAFETY: valid for 8 floats by the trait's contract.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn store_partial(to: *mut f32, vector: [f32; 8], lanes: usize) {
        for (i, value) in vector.into_iter().enumerate().take(lanes) {
            // SAFETY: only the first `lanes` floats are written.
            unsafe { *to.add(i) = value }
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn gate(gate: [f32; 8], value: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if gate[i] <= 0.0 { 0.0 } else { value[i] })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    /// AVX2 and FMA: eight lanes.
    #[derive(Clone, Copy)]
    pub(in crate::kernel) struct Avx2;

    // SAFETY (every block below): the caller guarantees AVX2 and FMA, and pointers valid for the lanes named.
    impl Simd for Avx2 {
        const LANES: usize = 8;
        type Vector = __m256;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_partial(from: *const f32, lanes: usize) -> __m256 {
            // SAFETY: see above; masked lanes are not accessed.
            unsafe { _mm256_maskload_ps(from, first_lanes(lanes)) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, vector: __m256) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_ps(to, vector) }
        }

        #[inline(always)]
        unsafe fn store_partial(to: *mut f32, vector: __m256, lanes: usize) {
            // SAFETY: see above; masked lanes are not accessed.
            unsafe { _mm256_maskstore_ps(to, first_lanes(lanes), vector) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn gate(gate: __m256, value: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(gate, _mm256_setzero_ps()), value) }
        }
    }

    /// All bits set in the first `lanes` lanes.
    #[inline(always)]
    unsafe fn first_lanes(lanes: usize) -> __m256i {
        // SAFETY: the caller guarantees AVX2.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    /// AVX-512: sixteen lanes.
    #[derive(Clone, Copy)]
    pub(in crate::kernel) struct Avx512;

    // SAFETY (every block below): the caller guarantees AVX-512 F, and pointers valid for the lanes named.
    impl Simd for Avx512 {
        const LANES: usize = 16;
        type Vector = __m512;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_partial(from: *const f32, lanes: usize) -> __m512 {
            // SAFETY: see above; masked lanes are not accessed.
            unsafe { _mm512_maskz_loadu_ps(((1u32 << lanes) - 1) as __mmask16, from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, vector: __m512) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to, vector) }
        }

        #[inline(always)]
        unsafe fn store_partial(to: *mut f32, vector: __m512, lanes: usize) {
            // SAFETY: see above; masked lanes are not accessed.
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << lanes) - 1) as __mmask16, vector) }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn gate(gate: __m512, value: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLE_UQ>(gate, _mm512_setzero_ps()), value) }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod arm {
    use std::arch::aarch64::*;

    use super::Simd;

    /// NEON: four lanes.
    #[derive(Clone, Copy)]
    pub(in crate::kernel) struct Neon;

    // SAFETY (every block below): NEON is part of aarch64; pointers are valid for the lanes named.
    impl Simd for Neon {
        const LANES: usize = 4;
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
    }
}
