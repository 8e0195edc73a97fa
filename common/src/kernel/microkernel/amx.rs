//! Blocks of products by AMX: one instruction adds a block to each of 16 x 16 sums.
//!
//! `tdpbf16ps` takes two tiles of registers: 16 rows of up to 16 pairs, and as many rows of 16 pairs. It makes two chains of fused
//! multiply-adds for each sum, one of the first and one of the second numbers of the pairs, and adds both (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 2). Up to four tiles of sums share a tile of rows. Operands of rows are read where
//! they lie if they are evenly spaced, and copied together before if not; those of columns are read where they lie.

mod registers;
mod usable;

use registers::{Configuration, Operands, add_full, add_rest, clear_sums, load_sums, release, store_sums};
pub(super) use usable::is_usable;

use super::blocks::{Adder, Line, Lines, PAIRS, ROWS, Segments, Sums};
use super::{Block, Row};
use crate::kernel::bf16::BlockedPair;
use crate::kernel::simd::Simd;
use crate::kernel::simd::x86::Avx512;

/// Places for copies of operands, taken by turns: one is made while the one before it is multiplied.
const COPIES: usize = 4;

/// Columns of a tile of sums.
const WIDTH: usize = 16;

/// The rows' operands of a block.
#[repr(align(64))]
struct Copied([f32; ROWS * PAIRS]);

/// Tiles of registers, which hold sums while a segment is added.
pub(super) struct Tiles {
    copies: [Copied; COPIES],
    /// Pairs of blocks that are not full, for which registers are configured; 0 if they are configured for full ones alone.
    rest: Option<usize>,
    /// Tiles of sums: 1 to 4.
    width: usize,
}

impl Tiles {
    /// Registers for a block of outputs.
    ///
    /// # Safety
    /// The process may use AMX.
    pub(super) unsafe fn new(block: &Block<'_, BlockedPair>) -> Self {
        Self {
            copies: [const { Copied([0.0; ROWS * PAIRS]) }; COPIES],
            rest: None,
            width: block.columns.div_ceil(WIDTH),
        }
    }

    /// Configures registers for full blocks, and others of `rest` pairs, if they are not yet. That sets them to 0.
    unsafe fn configure(&mut self, rest: usize) {
        if self.rest != Some(rest) {
            // SAFETY: AMX may be used, or there would be no `Tiles`.
            unsafe { Configuration::new(rest).load() }
            self.rest = Some(rest);
        }
    }

    /// Loads the sums.
    unsafe fn load(&mut self, sums: &Sums) {
        for tile in 0..self.width {
            // SAFETY: registers are configured; sums are whole tiles.
            unsafe { load_sums(tile, sums.0.as_ptr().add(tile * WIDTH)) }
        }
    }

    /// Stores the sums.
    unsafe fn store(&mut self, sums: &mut Sums) {
        for tile in 0..self.width {
            // SAFETY: registers are configured; sums are whole tiles.
            unsafe { store_sums(tile, sums.0.as_mut_ptr().add(tile * WIDTH)) }
        }
    }

    /// Adds a block.
    #[inline(always)]
    unsafe fn add_block(&mut self, operands: &Operands) {
        // SAFETY: registers are configured for blocks of so many pairs, which are readable by the caller's promise.
        unsafe {
            match operands.depth {
                PAIRS => add_full(self.width, operands),
                _ => add_rest(self.width, operands),
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.rest.is_some() {
            // SAFETY: AMX may be used. Without this, the kernel would keep 8 KiB for this thread at each switch.
            unsafe { release() }
        }
    }
}

impl Adder for Tiles {
    #[inline(always)]
    unsafe fn add<S: Simd, const V: usize>(
        &mut self,
        block: &Block<'_, BlockedPair>,
        rows: &[Row],
        segments: Segments<'_>,
        start: Option<&Sums>,
        sums: &mut Sums,
    ) {
        // SAFETY: the caller's promises are the callee's; there are `Tiles` only where there is AVX-512.
        unsafe { add(self, block, rows, segments, start, sums) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn add(
    tiles: &mut Tiles,
    block: &Block<'_, BlockedPair>,
    rows: &[Row],
    segments: Segments<'_>,
    start: Option<&Sums>,
    sums: &mut Sums,
) {
    let apart = evenly_apart(rows).filter(|_| block.a_step == 1);
    let mut before: Option<Operands> = None;
    let mut copy_to = 0;
    // SAFETY: the caller's promise.
    unsafe {
        let lines = Lines::new(block, segments);
        tiles.configure(lines.rest());
        match start {
            Some(start) => tiles.load(start),
            None => clear_sums(),
        }
        for Line { a, b, len } in lines {
            for first in (0..len).step_by(PAIRS) {
                let depth = PAIRS.min(len - first);
                let a = block.a.wrapping_offset(a + (first * block.a_step) as isize).cast::<f32>();
                let (first_operands, first_stride) = match apart {
                    Some(apart) => (a.wrapping_add(rows[0].a as usize), apart * size_of::<f32>()),
                    None => {
                        let copied = &mut tiles.copies[copy_to];
                        copy_to = (copy_to + 1) % COPIES;
                        copy(a, block.a_step, rows, depth, copied);
                        (copied.0.as_ptr(), PAIRS * size_of::<f32>())
                    }
                };
                let operands = Operands {
                    first: first_operands,
                    first_stride,
                    second: block.b.wrapping_add(b + first * block.b_stride),
                    second_stride: block.b_stride * size_of::<BlockedPair>(),
                    depth,
                };
                if let Some(before) = before.replace(operands) {
                    tiles.add_block(&before);
                }
                if depth < PAIRS && tiles.rest != Some(depth) {
                    tiles.store(sums);
                    tiles.configure(depth);
                    tiles.load(sums);
                }
            }
        }
        if let Some(before) = before {
            tiles.add_block(&before);
        }
        tiles.store(sums);
    }
}

/// How far operands of a whole tile's rows are apart, if they are evenly so.
fn evenly_apart(rows: &[Row]) -> Option<usize> {
    let rows: &[Row; ROWS] = rows.try_into().ok()?;
    let apart = rows[1].a.checked_sub(rows[0].a)?;
    rows.windows(2).all(|rows| rows[0].a.checked_add(apart) == Some(rows[1].a)).then_some(apart as usize)
}

/// Copies `depth` pairs of each row to rows of [`PAIRS`].
#[inline(always)]
unsafe fn copy(a: *const f32, step: usize, rows: &[Row], depth: usize, to: &mut Copied) {
    let of_row = |row: &Row| a.wrapping_add(row.a as usize);
    // SAFETY: pairs of a row are readable, by the caller's promise. A pair is a float that is moved and never computed with.
    unsafe {
        if step == 1 {
            for (row, to) in rows.iter().zip(to.0.chunks_exact_mut(PAIRS)) {
                let pairs = match depth {
                    PAIRS => Avx512::load(of_row(row)),
                    _ => Avx512::load_partial(of_row(row), depth),
                };
                Avx512::store(to.as_mut_ptr(), pairs);
            }
            return;
        }
        // Rows whose operands adjoin are columns of a matrix.
        let mut to = to.0.as_mut_ptr();
        for rows in rows.chunk_by(|row, next| next.a == row.a + 1) {
            Avx512::transpose(of_row(&rows[0]), step, [depth, rows.len()], to, PAIRS);
            to = to.add(rows.len() * PAIRS);
        }
    }
}
