//! Optimizers. They run on the coordinator, chunk by chunk, as soon as a chunk's gradient is whole.

pub mod adam;

pub use adam::{Adam, EpsilonForm};
