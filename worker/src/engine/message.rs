//! What the engine is told, and what it makes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lockstep_common::kernel::Precision;
use lockstep_common::protocol::{Assignment, Bytes, NodeReport, Work};
use lockstep_common::reduce::NodeId;
use lockstep_common::shared_memory::{FloatBuffer, Region};

/// What the engine is told.
#[derive(Debug)]
pub enum Command {
    /// A part of a version of the parameters.
    Chunk {
        /// Rounds that made the version.
        version: u64,
        /// Which chunk.
        chunk: u32,
        /// Little-endian floats, or what of them travels in this precision.
        data: Bytes,
        /// How data holds the floats.
        precision: Precision,
    },
    /// A whole version.
    Whole {
        /// Rounds that made the version.
        version: u64,
        /// The flat vector.
        values: Arc<FloatBuffer>,
    },
    /// Leaves to compute, once the parameters of their version are there.
    Assign(Assignment),
    /// A gradient or a part of one that was sent: its memory can be used again.
    Recycle(FloatBuffer),
}

/// What the engine makes.
#[derive(Debug)]
pub enum Output {
    /// A tree node: its gradient is computed, or there is none; or, if the report does not say how long that took, its parts
    /// follow.
    Node {
        /// What to report with it.
        report: NodeReport,
        /// Its gradient sum, if there is one and it is whole.
        gradient: Option<FloatBuffer>,
    },
    /// A part of the gradient of a node that was reported before.
    Part {
        /// What the node belongs to.
        work: Work,
        /// Which node.
        node: NodeId,
        /// The part's first chunk.
        chunk: u32,
        /// Its floats.
        gradient: FloatBuffer,
        /// With the last part, which begins with the first chunk: how long the worker computed for the assignment.
        compute: Option<Duration>,
    },
    /// A leaf, for comparison.
    Compared(NodeReport),
    /// The engine cannot do what it was told.
    Failed(String),
}

/// How the gradients of nodes get to the coordinator.
#[derive(Clone, Debug)]
pub enum Handover {
    /// It is in the same process, and reads them where they are.
    InProcess,
    /// They are computed in memory that it sees too, as long as there is room.
    Shared(Arc<Region>),
    /// They are sent, which takes time. So what is done of a large one goes ahead, and is sent, added and stepped with while
    /// the rest is computed. (On the same host, that would take the processors away from who computes.)
    Sent,
}

/// The newest work that the coordinator has sent, shared with the session: what is older is over, and a worker that is
/// late with it stops computing it.
#[derive(Clone, Debug, Default)]
pub struct NewestWork(Arc<AtomicU64>);

impl NewestWork {
    /// Work has come.
    pub fn came(&self, work: Work) {
        self.0.fetch_max(work.place(), Ordering::Relaxed);
    }

    /// This work is over, although newer work has not come yet.
    pub fn end(&self, work: Work) {
        self.0.fetch_max(work.place() + 1, Ordering::Relaxed);
    }

    /// Whether newer work than this has come, or it is over.
    pub fn is_after(&self, work: Work) -> bool {
        self.0.load(Ordering::Relaxed) > work.place()
    }
}
