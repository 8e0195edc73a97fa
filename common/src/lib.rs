//! The pure, deterministic core of Lockstep.
//!
//! Nothing in this crate knows a clock, a network or an async runtime. What is computed here depends on its arguments
//! alone, and, under the numerics contract (`docs/numerics.md`), gives the same bits on every instruction set, for any
//! number of threads and of workers.

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod files;
pub mod fingerprint;
pub mod hash;
pub mod image_grid;
mod json_float;
pub mod kernel;
pub mod ledger;
pub mod model;
pub mod model_file;
pub mod nn;
pub mod optim;
pub mod pca;
pub mod placement;
pub mod progress;
pub mod protocol;
pub mod reduce;
pub mod rng;
pub mod shape;
pub mod shard;
pub mod shared_memory;
