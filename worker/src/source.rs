//! The samples of an assignment's leaves, as the engine reads them, and what is to be done with the leaves' sums.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use lockstep_common::hash::Digest;
use lockstep_common::model::Layout;
use lockstep_common::nn::{Buffers, Inspection, LeafSource, Network, NotFinite, Weights};
use lockstep_common::placement::ShardSamples;
use lockstep_common::protocol::{Finding, Handing, MAX_NAMED_SAMPLES, Work};
use lockstep_common::reduce::NodeId;
use lockstep_common::shard::samples_digest;

use crate::engine::NewestWork;

/// One leaf's samples.
pub(crate) struct LeafSamples {
    pub(crate) samples: Arc<ShardSamples>,
    /// The shard's places in the order of the epoch.
    pub(crate) order: Arc<Vec<u32>>,
    /// Which of them the leaf takes.
    pub(crate) places: Range<u32>,
}

impl LeafSamples {
    fn place(&self, i: usize) -> u32 {
        self.order[self.places.start as usize + i]
    }

    pub(crate) fn digest(&self) -> Digest {
        samples_digest((0..self.places.len()).map(|i| self.samples.id(self.place(i))))
    }
}

/// The samples of all leaves of an assignment.
pub(crate) struct Source {
    pub(crate) leaves: BTreeMap<u32, LeafSamples>,
    /// Leaves that are not simply summed.
    pub(crate) handings: BTreeMap<u32, Handing>,
    pub(crate) work: Work,
    pub(crate) newest: NewestWork,
}

impl Source {
    fn handing(&self, node: NodeId) -> Option<Handing> {
        self.handings.get(&node.index).copied().filter(|_| node.level == 0)
    }

    /// Whether the digest of the node's gradient is wanted.
    pub(crate) fn asks_for_digest(&self, node: NodeId) -> bool {
        self.handing(node).is_some()
    }

    /// Whether nothing but the digest is wanted.
    pub(crate) fn compares(&self, node: NodeId) -> bool {
        self.handing(node) == Some(Handing::Compared)
    }

    /// The first leaf of a node that is not finite.
    pub(crate) fn inspect(
        &self,
        network: &Network,
        weights: Weights<'_>,
        layout: &Layout,
        node: NodeId,
        buffers: &Buffers,
    ) -> Option<Finding> {
        let inspection = Inspection { network, weights, layout, source: self, max_samples: MAX_NAMED_SAMPLES };
        let NotFinite { leaf, samples, loss, tensors } = inspection.first_not_finite(node, buffers)?;
        let of_leaf = &self.leaves[&leaf];
        let samples = samples.into_iter().map(|i| of_leaf.samples.id(of_leaf.place(i as usize))).collect();
        Some(Finding { leaf, samples, loss, tensors })
    }
}

impl LeafSource for Source {
    fn samples(&self, leaf: u32) -> u32 {
        // Work that is over has no samples: its leaves are done at once, and their sum is thrown away.
        if self.newest.is_after(self.work) {
            return 0;
        }
        self.leaves.get(&leaf).map_or(0, |leaf| leaf.places.len() as u32)
    }

    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        if let Some(leaf) = self.leaves.get(&leaf) {
            leaf.samples.write(leaf.place(i), out);
        }
    }
}
