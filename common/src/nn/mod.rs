//! Networks: a resolved model turned into plans, and the passes over them.

mod initialise;
mod linear;
mod loss;
mod network;
mod op;
mod subtree;

pub use initialise::initial_parameters;
pub use loss::Loss;
pub use network::{Network, Weights, Workspace};
pub use subtree::{Buffers, LeafSource, NodeSum, evaluate, subtree};
