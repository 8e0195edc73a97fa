//! Systems without sealed files in memory.

use std::io;
use std::ptr::NonNull;

use super::{Access, Offer, SharedMemoryError};

/// There is none on this system.
pub(super) enum Mapping {}

impl Mapping {
    pub(super) fn at(&self, _: usize) -> NonNull<f32> {
        match *self {}
    }

    pub(super) fn reserve(&self, _: usize, _: usize) -> Result<(), SharedMemoryError> {
        match *self {}
    }
}

fn unsupported<T>() -> Result<T, SharedMemoryError> {
    let cause = io::Error::from(io::ErrorKind::Unsupported);
    Err(SharedMemoryError::System { what: "shared memory between processes", cause })
}

pub(super) fn create(_: usize, _: Access) -> Result<(Mapping, u32, u128), SharedMemoryError> {
    unsupported()
}

pub(super) fn open(_: &Offer, _: usize, _: Access) -> Result<Mapping, SharedMemoryError> {
    unsupported()
}
