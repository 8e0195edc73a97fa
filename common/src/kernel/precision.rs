//! How precise the operands of product-sums are.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Isa;
use super::products::has_instruction;

/// Which numbers the operands of product-sums are rounded to. Sums, and all else, are 32-bit floats in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats: they are not rounded.
    #[default]
    F32,
    /// bfloat16: the upper half of a 32-bit float; see [`crate::kernel::bf16`].
    Bf16,
}

/// A name that is no precision's.
#[derive(Debug, thiserror::Error)]
#[error("precision {0:?} is neither f32 nor bf16")]
pub struct UnknownPrecision(String);

impl Precision {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    /// The name for command lines, files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(name: &str) -> Result<Self, UnknownPrecision> {
        Self::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| UnknownPrecision(name.to_owned()))
    }
}

/// What product-sums are computed with, and from what. The instruction set is a matter of speed, the precision one of
/// the mathematics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// On which instruction set.
    pub isa: Isa,
    /// From which operands.
    pub precision: Precision,
}

impl Arithmetic {
    /// Whether two products at a time are taken by an instruction that is made for it. (Other instructions give the same
    /// bits.)
    pub fn has_instruction(self) -> bool {
        self.precision == Precision::Bf16 && has_instruction(self.isa)
    }
}

impl From<Isa> for Arithmetic {
    /// 32-bit floats.
    fn from(isa: Isa) -> Self {
        Self { isa, precision: Precision::F32 }
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.precision {
            Precision::F32 => self.isa.fmt(f),
            Precision::Bf16 if self.has_instruction() => write!(f, "bf16 on {} by its instruction", self.isa),
            Precision::Bf16 => write!(f, "bf16 on {}", self.isa),
        }
    }
}
