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
    /// `a + b`
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Per lane: 0 where `gate <= 0`, else `value`. A NaN gate lets the value through, so that NaN stays visible.
    unsafe fn gate(gate: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// Writes the transpose of `LANES` rows of `LANES` floats, with the given distances from row to row.
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize);
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
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn gate(gate: [f32; 8], value: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if gate[i] <= 0.0 { 0.0 } else { value[i] })
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..8 {
            for column in 0..8 {
                // SAFETY: valid for 8 rows of 8 floats by the trait's contract.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) }
            }
        }
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
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_add_ps(a, b) }
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

        // Pairs of rows, then of pairs, then of halves: after each step twice as many rows lie side by side.
        #[inline(always)]
        unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: see above; 8 rows of 8 floats each.
            unsafe {
                let mut rows = [_mm256_setzero_ps(); 8];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = _mm256_loadu_ps(from.add(i * stride));
                }
                let mut pairs = [_mm256_setzero_ps(); 8];
                for i in 0..4 {
                    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
                }
                let mut fours = [_mm256_setzero_ps(); 8];
                for i in 0..2 {
                    for half in 0..2 {
                        let (upper, lower) = (pairs[4 * i + half], pairs[4 * i + half + 2]);
                        fours[4 * i + 2 * half] = _mm256_shuffle_ps::<0x44>(upper, lower);
                        fours[4 * i + 2 * half + 1] = _mm256_shuffle_ps::<0xee>(upper, lower);
                    }
                }
                for i in 0..4 {
                    let left = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
                    let right = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
                    _mm256_storeu_ps(to.add(i * to_stride), left);
                    _mm256_storeu_ps(to.add((i + 4) * to_stride), right);
                }
            }
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
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_add_ps(a, b) }
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

        // As for AVX2; quarter `q` of `fours[4 * i + c]` is column `4 * q + c` of rows `4 * i` to `4 * i + 3`.
        #[inline(always)]
        unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            // SAFETY: see above; 16 rows of 16 floats each.
            unsafe {
                let mut rows = [_mm512_setzero_ps(); 16];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = _mm512_loadu_ps(from.add(i * stride));
                }
                let mut pairs = [_mm512_setzero_ps(); 16];
                for i in 0..8 {
                    pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                    pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
                }
                let mut fours = [_mm512_setzero_ps(); 16];
                for i in 0..4 {
                    for half in 0..2 {
                        let (upper, lower) = (pairs[4 * i + half], pairs[4 * i + half + 2]);
                        fours[4 * i + 2 * half] = _mm512_shuffle_ps::<0x44>(upper, lower);
                        fours[4 * i + 2 * half + 1] = _mm512_shuffle_ps::<0xee>(upper, lower);
                    }
                }
                for c in 0..4 {
                    let even_upper = _mm512_shuffle_f32x4::<0x88>(fours[c], fours[4 + c]);
                    let odd_upper = _mm512_shuffle_f32x4::<0xdd>(fours[c], fours[4 + c]);
                    let even_lower = _mm512_shuffle_f32x4::<0x88>(fours[8 + c], fours[12 + c]);
                    let odd_lower = _mm512_shuffle_f32x4::<0xdd>(fours[8 + c], fours[12 + c]);
                    let store = |column: usize, values| _mm512_storeu_ps(to.add(column * to_stride), values);
                    store(c, _mm512_shuffle_f32x4::<0x88>(even_upper, even_lower));
                    store(4 + c, _mm512_shuffle_f32x4::<0x88>(odd_upper, odd_lower));
                    store(8 + c, _mm512_shuffle_f32x4::<0xdd>(even_upper, even_lower));
                    store(12 + c, _mm512_shuffle_f32x4::<0xdd>(odd_upper, odd_lower));
                }
            }
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
        unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
            // Reading every fourth float of 16 is a transpose.
            let mut rows = [0.0f32; 16];
            // SAFETY: see above; 4 rows of 4 floats each.
            unsafe {
                for i in 0..4 {
                    vst1q_f32(rows.as_mut_ptr().add(4 * i), vld1q_f32(from.add(i * stride)));
                }
                let columns = vld4q_f32(rows.as_ptr());
                vst1q_f32(to, columns.0);
                vst1q_f32(to.add(to_stride), columns.1);
                vst1q_f32(to.add(2 * to_stride), columns.2);
                vst1q_f32(to.add(3 * to_stride), columns.3);
            }
        }
    }
}
