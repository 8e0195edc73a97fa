//! Which instruction set the kernels use.

use std::fmt;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// An instruction set that this machine has.
///
/// A value of this type is the proof that its instructions may be executed: there is no way to make one that skips the
/// run-time check.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

/// A name that is no instruction set's, or one that this machine lacks.
#[derive(Debug, thiserror::Error)]
#[error("instruction set {name:?} cannot be used here; this machine has: {available}")]
pub struct UnknownIsa {
    name: String,
    available: String,
}

impl Isa {
    /// Plain `f32::mul_add`: the specification of all other paths, available everywhere, and slow.
    pub const SCALAR: Isa = Isa(Kind::Scalar);

    /// Every instruction set of this machine, the fastest first.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 {
                found.push(Isa(Kind::Avx512));
            }
            if avx2 {
                found.push(Isa(Kind::Avx2));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            found.push(Isa(Kind::Neon));
        }
        found.push(Isa::SCALAR);
        found
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// The instruction set called `name` (`scalar`, `avx2`, `avx512`, `neon`), or the fastest one for `auto`.
    ///
    /// # Errors
    /// [`UnknownIsa`] when there is no such name or this machine lacks it.
    pub fn parse(name: &str) -> Result<Isa, UnknownIsa> {
        if name == "auto" {
            return Ok(Isa::best());
        }
        let available = Isa::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| UnknownIsa {
            name: name.to_owned(),
            available: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The name for command lines and messages.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
        }
    }

    /// Whether processors of which this is the fastest instruction set mostly have small L2 caches: many with AVX2 have 256 or
    /// 512 KiB, most with AVX-512 1 MiB and more.
    pub fn has_small_caches(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => true,
            _ => false,
        }
    }

    /// Whether this processor takes vectors of 512 bits in two halves, as Zen 4 does. That is a matter of speed alone.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn halves_vectors(self) -> bool {
        static IS_ZEN_4: OnceLock<bool> = OnceLock::new();
        *IS_ZEN_4.get_or_init(|| amd_family() == Some(0x19))
    }

    /// Whether products that load an operand for each multiply-add are slow beside those that load it for several: as on Intel's
    /// processors, which begin 1.3 of the former in a cycle, and up to two of the latter. A Zen 5 is taken for one of these, too, which
    /// nobody has measured. That is a matter of speed alone.
    pub fn is_bound_by_loads(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => !self.halves_vectors(),
            _ => false,
        }
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

/// The family of a processor by AMD: 0x19 are Zen 3, which has no AVX-512, and Zen 4. (AMD, CPUID Specification, functions 0
/// and 1.)
#[cfg(target_arch = "x86_64")]
fn amd_family() -> Option<u32> {
    use std::arch::x86_64::__cpuid;
    let vendor = __cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let family = __cpuid(1).eax;
    let (base, extended) = (family >> 8 & 0xf, family >> 20 & 0xff);
    (name.as_flattened() == b"AuthenticAMD").then_some(if base == 0xf { base + extended } else { base })
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
