//! How precise the operands of product-sums are.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Isa, microkernel, products};

/// Which numbers something is rounded to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats: they are not rounded.
    #[default]
    F32,
    /// bfloat16: the upper half of a 32-bit float; see [`crate::kernel::bf16`].
    Bf16,
}

/// What product-sums are computed from, and in which order. Sums, and all else, are 32-bit floats in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compute {
    /// From 32-bit floats, product by product.
    #[default]
    F32,
    /// From operands that are rounded to bfloat16, product by product, as AVX-512 BF16 adds them.
    Bf16,
    /// From operands that are rounded to bfloat16, in blocks of products, as AMX adds them.
    Bf16Amx,
}

/// A name that is none of those that are known.
#[derive(Debug, thiserror::Error)]
#[error("precision {name:?} is none of {known}")]
pub struct UnknownPrecision {
    name: String,
    known: String,
}

/// Defines what an enumeration with names has.
macro_rules! named {
    ($type:ident, $count:literal, $($variant:ident $name:literal),*) => {
        impl $type {
            /// All of them.
            pub const ALL: [Self; $count] = [$(Self::$variant),*];

            /// The name for command lines, files and messages.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        impl FromStr for $type {
            type Err = UnknownPrecision;

            fn from_str(name: &str) -> Result<Self, UnknownPrecision> {
                Self::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| UnknownPrecision {
                    name: name.to_owned(),
                    known: Self::ALL.map(Self::name).join(", "),
                })
            }
        }
    };
}

named!(Precision, 2, F32 "f32", Bf16 "bf16");
named!(Compute, 3, F32 "f32", Bf16 "bf16", Bf16Amx "bf16-amx");

impl Compute {
    /// What operands are rounded to.
    pub fn operands(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 | Self::Bf16Amx => Precision::Bf16,
        }
    }
}

/// What product-sums are computed with, and from what. The instruction set is a matter of speed, the rest one of the
/// mathematics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// On which instruction set.
    pub isa: Isa,
    /// From which operands, in which order.
    pub compute: Compute,
}

impl Arithmetic {
    /// Whether products are taken by an instruction that is made for them. (Other instructions give the same bits.)
    pub fn has_instruction(self) -> bool {
        match self.compute {
            Compute::F32 => false,
            Compute::Bf16 => products::has_instruction(self.isa),
            Compute::Bf16Amx => microkernel::has_tiles(self.isa),
        }
    }
}

impl From<Isa> for Arithmetic {
    /// 32-bit floats.
    fn from(isa: Isa) -> Self {
        Self { isa, compute: Compute::F32 }
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.compute {
            Compute::F32 => self.isa.fmt(f),
            compute if self.has_instruction() => write!(f, "{compute} on {} by its instruction", self.isa),
            compute => write!(f, "{compute} on {}", self.isa),
        }
    }
}
