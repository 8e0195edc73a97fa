//! Networks: a resolved model turned into plans, and the passes over them.

mod dense;
mod initialise;
mod inspect;
mod linear;
mod live;
mod loss;
mod network;
mod op;
mod parts;
mod profile;
mod sparsity;
mod subtree;
mod sums;
mod workspace;

pub use initialise::initial_parameters;
pub use inspect::{Inspection, NotFinite};
pub use loss::Loss;
pub use network::{Network, Weights, WriteSample};
pub use parts::{Told, subtree_in_parts};
pub use profile::{Lap, profile};
pub use sparsity::ZeroProducts;
pub use subtree::{Buffers, LeafSource, NodeSum, evaluate, subtree};
pub use workspace::Workspace;
