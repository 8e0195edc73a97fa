//! Lockstep's coordinator: it shards the data, sums gradients, takes optimizer steps and keeps the record.
//!
//! Decisions are made by a pure state machine ([`round`]); one [`driver`] performs them; the [`aggregate`] thread does
//! the arithmetic. Workers are reached through [`link`]s, which are channels inside a process or gRPC ([`grpc`]).

pub mod aggregate;
pub mod checkpoint;
pub mod driver;
pub mod expected;
pub mod grpc;
mod held;
pub mod journal;
pub mod link;
mod log_file;
pub mod metrics;
pub mod monitor;
pub mod outputs;
pub mod resume;
pub mod round;
mod run;
mod trouble;

pub use driver::RunResult;
pub use run::{Coordinator, CoordinatorConfig, Origin, StartError};
