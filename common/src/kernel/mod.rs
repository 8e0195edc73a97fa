//! The compute kernels: the only place in the workspace with `unsafe`.
//!
//! Two kinds of code live here. *Product-sums* go through one microkernel ([`contraction`]), written against a few
//! vector primitives (`simd`); its result is defined by a fixed chain of fused multiply-adds for each output, so it
//! does not depend on the vector width. *Elementwise* functions ([`elementwise`], [`math`]) are written once as plain
//! Rust over slices, which is their specification, and compiled once for each instruction set; Rust never reassociates
//! or contracts floating-point operations, so all versions give the same bits.

mod ahead;
mod aligned;
pub mod bf16;
mod combination;
pub mod contraction;
pub mod elementwise;
mod isa;
pub mod lists;
pub mod math;
mod microkernel;
mod per_isa;
pub mod pooling;
mod precision;
pub mod probe;
mod products;
mod simd;
pub mod streaming;
pub mod survey;
pub mod transpose;

pub use aligned::AlignedFloats;
pub use isa::{Isa, UnknownIsa};
pub use precision::{Arithmetic, Compute, Precision, UnknownPrecision};
pub use products::{ChainElement, Element};
