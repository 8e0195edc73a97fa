//! The registers of AMX, and what is done with them.
//!
//! Nothing else in the process uses tiles of registers: the compiler does not know what is in them, and leaves them alone.

use std::arch::asm;

use crate::kernel::bf16::BlockedPair;
use crate::kernel::microkernel::blocks::COLUMNS;

/// Bytes from a row of sums in memory to the next.
const SUMS_STRIDE: usize = COLUMNS * size_of::<f32>();

/// Operands of a block of products. Rows are so many bytes apart.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) first: *const f32,
    pub(super) first_stride: usize,
    pub(super) second: *const BlockedPair,
    pub(super) second_stride: usize,
    pub(super) depth: usize,
}

/// What the registers are: palette 1, up to 8 tiles, each with so many rows of so many bytes.
#[repr(C, align(64))]
pub(super) struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Tiles 0 to 3 are sums, 4 and 5 operands of full blocks, 6 and 7 those of blocks of `rest` pairs.
    pub(super) fn new(rest: usize) -> Self {
        let mut configuration = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let shapes =
            [[16, 16]; 6].into_iter().chain((rest > 0).then_some([16, rest])).chain((rest > 0).then_some([rest, 16]));
        for (tile, [rows, words]) in shapes.enumerate() {
            configuration.rows[tile] = rows as u8;
            configuration.row_bytes[tile] = (words * size_of::<f32>()) as u16;
        }
        configuration
    }

    /// Configures this thread's registers, and sets them to 0.
    pub(super) unsafe fn load(&self) {
        // SAFETY: the caller has AMX; 64 bytes are readable.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly)) }
    }
}

/// Gives the registers back.
///
/// # Safety
/// The caller has AMX.
pub(super) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// Sets all tiles of sums to 0.
///
/// # Safety
/// The caller has configured registers.
pub(super) unsafe fn clear_sums() {
    // SAFETY: the caller has configured registers.
    unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem)) }
}

/// Loads a tile of sums.
///
/// # Safety
/// The caller has configured registers; 16 rows are readable.
pub(super) unsafe fn load_sums(tile: usize, from: *const f32) {
    // SAFETY: the caller has configured registers; 16 rows are readable.
    unsafe {
        match tile {
            0 => asm!("tileloadd tmm0, [{} + {}]", in(reg) from, in(reg) SUMS_STRIDE, options(nostack, readonly)),
            1 => asm!("tileloadd tmm1, [{} + {}]", in(reg) from, in(reg) SUMS_STRIDE, options(nostack, readonly)),
            2 => asm!("tileloadd tmm2, [{} + {}]", in(reg) from, in(reg) SUMS_STRIDE, options(nostack, readonly)),
            _ => asm!("tileloadd tmm3, [{} + {}]", in(reg) from, in(reg) SUMS_STRIDE, options(nostack, readonly)),
        }
    }
}

/// Stores a tile of sums.
///
/// # Safety
/// The caller has configured registers; 16 rows are writable.
pub(super) unsafe fn store_sums(tile: usize, to: *mut f32) {
    // SAFETY: the caller has configured registers; 16 rows are writable.
    unsafe {
        match tile {
            0 => asm!("tilestored [{} + {}], tmm0", in(reg) to, in(reg) SUMS_STRIDE, options(nostack)),
            1 => asm!("tilestored [{} + {}], tmm1", in(reg) to, in(reg) SUMS_STRIDE, options(nostack)),
            2 => asm!("tilestored [{} + {}], tmm2", in(reg) to, in(reg) SUMS_STRIDE, options(nostack)),
            _ => asm!("tilestored [{} + {}], tmm3", in(reg) to, in(reg) SUMS_STRIDE, options(nostack)),
        }
    }
}

/// Loads the rows' operands of a block, and for each tile of sums those of its columns, and adds the block to it.
macro_rules! add_to_tiles {
    ($operands:expr, $first:literal, $second:literal, $($sums:literal at $place:literal),*) => {{
        let Operands { first, first_stride, second, second_stride, .. } = *$operands;
        asm!(
            concat!("tileloadd ", $first, ", [{first} + {first_stride}]"),
            $(
                concat!("tileloadd ", $second, ", [{second} + {second_stride} + ", $place, "]"),
                concat!("tdpbf16ps ", $sums, ", ", $first, ", ", $second),
            )*
            first = in(reg) first,
            first_stride = in(reg) first_stride,
            second = in(reg) second,
            second_stride = in(reg) second_stride,
            options(nostack, readonly)
        )
    }};
}

/// Defines a function that adds one block to 1 to 4 tiles of sums, with two registers for its operands.
macro_rules! add_block {
    ($(#[$doc:meta])* $name:ident, $first:literal, $second:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) unsafe fn $name(width: usize, operands: &Operands) {
            // SAFETY: the caller has configured registers; operands are readable by its promise.
            unsafe {
                match width {
                    1 => add_to_tiles!(operands, $first, $second, "tmm0" at "0"),
                    2 => add_to_tiles!(operands, $first, $second, "tmm0" at "0", "tmm1" at "64"),
                    3 => add_to_tiles!(operands, $first, $second, "tmm0" at "0", "tmm1" at "64", "tmm2" at "128"),
                    _ => add_to_tiles!(
                        operands, $first, $second, "tmm0" at "0", "tmm1" at "64", "tmm2" at "128", "tmm3" at "192"
                    ),
                }
            }
        }
    };
}

add_block! {
    /// A full block.
    add_full, "tmm4", "tmm5"
}
add_block! {
    /// A block of as many pairs as registers are configured for.
    add_rest, "tmm6", "tmm7"
}
