//! The few vector primitives that the microkernel is written against, for each instruction set.

#[cfg(target_arch = "aarch64")]
pub(super) mod arm;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

/// Floats of the widest vector of any instruction set.
pub(super) const MAX_LANES: usize = 16;

/// Vectors of `LANES` floats. Lanes never meet: every operation is elementwise, so results do not depend on `LANES`.
///
/// # Safety
/// All functions require that the machine has the instruction set, and that pointers are valid for the lanes named.
pub trait Simd: Copy {
    /// Floats in a vector.
    const LANES: usize;
    /// Products that the loop of a tile takes between two branches, where the tile is one vector of columns wide, two, three
    /// or four. Where that was measured (AVX2 on a Zen 3, AVX-512 on an Intel core and a Zen 5), four are mostly faster than
    /// one for the widest tiles, up to 1.2 times; slower for narrow ones with AVX-512 (0.6 to 0.98 times), and for sums of
    /// fewer than a dozen products.
    const UNROLLED: [usize; 4];
    /// Vectors that can be summed up in registers, with some to spare.
    const SUMS: usize;
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
    /// Writes `LANES` floats to an address that is a multiple of a vector's size, without bringing its line into the caches where
    /// there is an instruction for that.
    #[inline(always)]
    unsafe fn store_past_caches(to: *mut f32, vector: Self::Vector) {
        // SAFETY: the caller's promise.
        unsafe { Self::store(to, vector) }
    }
    /// The same float in every lane.
    unsafe fn splat(value: f32) -> Self::Vector;
    /// `a + b`
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Per lane: 0 where `gate <= 0`, else `value`. A NaN gate lets the value through, so that NaN stays visible.
    unsafe fn gate(gate: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// Per lane: 0 where the magnitude is below `limit`, else `value`. NaN stays.
    unsafe fn clear_below(limit: f32, value: Self::Vector) -> Self::Vector;
    /// Per lane: the upper 16 bits, and 0 below them.
    unsafe fn upper_half(bits: Self::Vector) -> Self::Vector;
    /// Per lane: the lower 16 bits as the upper ones, and 0 below them.
    unsafe fn lower_half(bits: Self::Vector) -> Self::Vector;
    /// Writes those of `LANES` words that have one of the bits, one after the other, and what belongs to them; returns how many
    /// they are. Up to `LANES` words are written in any case.
    #[inline(always)]
    unsafe fn keep_nonzero(from: *const u32, bits: u32, with: *const u32, to: [*mut u32; 2]) -> usize {
        let mut kept = 0;
        for i in 0..Self::LANES {
            // SAFETY: the caller's promise.
            unsafe {
                *to[0].add(kept) = *from.add(i);
                *to[1].add(kept) = *with.add(i);
                kept += usize::from(*from.add(i) & bits != 0);
            }
        }
        kept
    }
    /// Writes the transpose of at most `LANES` rows of at most `LANES` columns, with the given distances from row to row.
    unsafe fn transpose(from: *const f32, stride: usize, shape: [usize; 2], to: *mut f32, to_stride: usize);
}

/// The specification: eight lanes of `f32::mul_add`.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

// SAFETY (whole impl): pointers are valid for the lanes named, by the trait's contract; no special instructions.
impl Simd for Scalar {
    const LANES: usize = 8;
    const UNROLLED: [usize; 4] = [1; 4];
    const SUMS: usize = 12;
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
    unsafe fn clear_below(limit: f32, value: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if value[i].abs() < limit { 0.0 } else { value[i] })
    }

    #[inline(always)]
    unsafe fn upper_half(bits: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| f32::from_bits(bits[i].to_bits() & 0xffff_0000))
    }

    #[inline(always)]
    unsafe fn lower_half(bits: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| f32::from_bits(bits[i].to_bits() << 16))
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, [rows, columns]: [usize; 2], to: *mut f32, to_stride: usize) {
        for row in 0..rows {
            for column in 0..columns {
                // SAFETY: valid for rows and columns by the trait's contract.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) }
            }
        }
    }
}
