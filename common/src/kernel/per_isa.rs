//! One source, one compilation for each instruction set.

/// Defines functions that take an [`Isa`](super::Isa) first and run the same body compiled for it.
///
/// The body is ordinary safe Rust; the compiler vectorises it as the instruction set allows. Since it may neither
/// reorder nor fuse floating-point operations, every version computes the same bits.
macro_rules! per_isa {
    ($($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => { $(
        $(#[$doc])*
        $vis fn $name(isa: $crate::kernel::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

            match isa.kind() {
                // SAFETY: a value of `Isa` exists only for instruction sets that were detected on this machine.
                #[cfg(target_arch = "x86_64")]
                $crate::kernel::isa::Kind::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernel::isa::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // NEON is part of every aarch64 baseline, so the plain compilation uses it already.
                #[cfg(target_arch = "aarch64")]
                $crate::kernel::isa::Kind::Neon => body($($arg),*),
                $crate::kernel::isa::Kind::Scalar => body($($arg),*),
            }
        }
    )* };
}

pub(super) use per_isa;
