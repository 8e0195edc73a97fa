//! Whether there is AMX, this process may use it, and it adds as `blocks.rs` says.

use std::sync::OnceLock;

use crate::kernel::isa::{Isa, Kind};
use crate::kernel::microkernel::blocks;

/// Whether this process may use AMX, and it adds as `blocks.rs` says. It is looked at once.
pub(in crate::kernel::microkernel) fn is_usable() -> bool {
    static IS_USABLE: OnceLock<bool> = OnceLock::new();
    *IS_USABLE.get_or_init(|| has_instructions() && may_use_registers() && is_exact())
}

/// AMX-TILE and AMX-BF16: bits 24 and 22 of function 7's EDX. Both, because the latter needs the former.
fn has_instructions() -> bool {
    const BOTH: u32 = 1 << 24 | 1 << 22;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BOTH == BOTH
}

/// Asks Linux for the registers, which it gives to processes that ask for them (Documentation/arch/x86/xstate.rst). It refuses
/// where it does not know AMX.
#[cfg(target_os = "linux")]
fn may_use_registers() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a number goes in, and nothing of this process' memory is touched.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Nobody has tried other systems.
#[cfg(not(target_os = "linux"))]
fn may_use_registers() -> bool {
    false
}

/// Whether the instructions give the bits of plain code: other processors might round otherwise.
fn is_exact() -> bool {
    let avx512 = Isa::available().into_iter().find(|isa| isa.kind() == Kind::Avx512);
    // SAFETY: the process may use AMX, or nobody would ask; operands are those of the block.
    avx512.is_some_and(|isa| check::agrees(|block| unsafe { blocks::by_tiles(isa, block) }))
}

mod check {
    use crate::kernel::bf16::{self, BlockedPair};
    use crate::kernel::isa::Isa;
    use crate::kernel::microkernel::blocks::{self, ROWS};
    use crate::kernel::microkernel::{Block, Finish, Row, Run, Start};
    use crate::rng::{Purpose, Stream};

    /// Columns of the blocks of outputs that are compared: a tile and a part of one.
    const COLUMNS: usize = 23;
    /// Elements of a row of the second operand, and floats of a row of outputs.
    const WIDTH: usize = 32;
    /// Pairs of the longest line: two blocks and one that is not full.
    const LONGEST: usize = 35;

    /// Whether `compute` gives the bits of plain code, for pseudo-random pairs in lines of every length.
    pub(super) fn agrees(compute: impl Fn(&Block<'_, BlockedPair>) -> bool) -> bool {
        let mut stream = Stream::new(1, Purpose::SelfTest, 1, 0);
        let rows: Vec<Row> = (0..ROWS as u32).map(|i| Row { a: i * LONGEST as u32, c: i * WIDTH as u32 }).collect();
        (1..=LONGEST as u32).all(|depth| {
            let with_extremes = depth % 5 == 0;
            let mut numbers = |count: usize| -> Vec<f32> {
                (0..count).map(|_| bf16::round(number(&mut stream, with_extremes))).collect()
            };
            let before = numbers(ROWS * WIDTH);
            let mut pairs = |count: usize| -> Vec<BlockedPair> {
                numbers(2 * count)
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&[first, second]| BlockedPair::new(first, second))
                    .collect()
            };
            let (a, b) = (pairs(ROWS * LONGEST), pairs(LONGEST * WIDTH));
            let runs = [Run { a: 0, b: 0, depth, line: depth }];
            let bits = |compute: &dyn Fn(&Block<'_, BlockedPair>) -> bool| {
                let mut sums = before.clone();
                compute(&Block {
                    a: a.as_ptr(),
                    b: b.as_ptr(),
                    c: sums.as_mut_ptr(),
                    rows: &rows,
                    runs: &runs,
                    segments: &[1],
                    a_repeat: 0,
                    b_repeat: 0,
                    a_step: 1,
                    b_stride: WIDTH,
                    columns: COLUMNS,
                    start: Start::Accumulate,
                    finish: Finish::Keep,
                    rounded_on: None,
                    ahead: None,
                });
                sums.into_iter().map(|sum| if sum.is_nan() { None } else { Some(sum.to_bits()) }).collect::<Vec<_>>()
            };
            // SAFETY: operands have as many rows and columns as the block says.
            bits(&compute) == bits(&|block| unsafe { blocks::compute_in_blocks(Isa::SCALAR, block) })
        })
    }

    /// Most often near 1, where sums round most; with extremes, also of any size, infinite or NaN.
    fn number(stream: &mut Stream, with_extremes: bool) -> f32 {
        match stream.below(16) {
            0 if with_extremes => f32::from_bits(stream.below(u32::MAX)),
            1 => 0.0,
            2..5 => (stream.uniform() - 0.5) * 2.0f32.powi(stream.below(80) as i32 - 50),
            _ => stream.uniform() * 4.0 - 2.0,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::kernel::bf16::Bf16Pair;
        use crate::kernel::microkernel;

        /// The block with its products added one by one.
        unsafe fn compute_one_by_one(block: &Block<'_, BlockedPair>) -> bool {
            let Block { a, b, c, rows, runs, segments, a_repeat, b_repeat, a_step, b_stride, columns, .. } = *block;
            let (a, b): (*const Bf16Pair, *const Bf16Pair) = (a.cast(), b.cast());
            let (start, finish, rounded_on, ahead) = (block.start, block.finish, None, None);
            let block = Block {
                a,
                b,
                c,
                rows,
                runs,
                segments,
                a_repeat,
                b_repeat,
                a_step,
                b_stride,
                columns,
                start,
                finish,
                rounded_on,
                ahead,
            };
            // SAFETY: the caller's promises are the callee's.
            unsafe { microkernel::run(Isa::SCALAR, &block) }
        }

        #[test]
        fn instructions_that_add_otherwise_are_found_out() {
            // SAFETY: operands have as many rows and columns as the block says.
            unsafe {
                assert!(agrees(|block| blocks::compute_in_blocks(Isa::best(), block)));
                assert!(!agrees(|block| compute_one_by_one(block)));
            }
        }
    }
}
