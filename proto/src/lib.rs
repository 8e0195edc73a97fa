//! The gRPC protocol of Lockstep: generated code, and everything that turns it into domain values and back.
//!
//! Nothing outside this crate keeps a generated type: a coordinator's server and a worker's client read a message, turn
//! it into values of [`lockstep_common::protocol`] or [`lockstep_common::progress`] with [`convert`], and go on with
//! those. Whatever a peer sends, the conversion ends in a value or in a [`WireError`], never in a panic.

pub mod chunk;
pub mod convert;
pub mod limits;
pub mod secret_file;
pub mod status;
pub mod target;
pub mod token;
pub mod transport;
mod wire_error;

pub use wire_error::{Fault, WireError};

/// The generated messages, clients and servers of the package `lockstep.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("lockstep.v1");
}

/// The encoded `FileDescriptorSet` of the package, with comments: for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lockstep.v1.bin"));
