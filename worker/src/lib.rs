//! Lockstep's worker: it joins a run, fetches its shards, computes leaves and hands in their sums.
//!
//! Async code moves bytes ([`session`], [`client`]), rayon does the mathematics ([`engine`]); one pair of channels lies
//! between them.

pub mod client;
pub mod engine;
#[cfg(test)]
mod example;
pub mod session;
pub mod shard_cache;
mod sharing;
mod source;

/// This release: coordinator and workers must be of the same one.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
