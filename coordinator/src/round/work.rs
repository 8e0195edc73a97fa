//! The piece of work at hand: which leaves are assigned to whom, and which are done.

use std::time::Duration;

use lockstep_common::hash::Digest;
use lockstep_common::ledger::Contribution;
use lockstep_common::progress::Aggregation;
use lockstep_common::protocol::{MemberId, NodeReport, Work};
use lockstep_common::reduce::{NodeId, Reduction, Tree};

/// Sum of losses and number of samples under a tree node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Totals {
    pub(super) loss: f64,
    pub(super) samples: u32,
}

/// What the optimizer step of a round made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reduced {
    /// Euclidean norm of the mean gradient.
    pub(super) gradient_norm: f64,
    /// Digest of the new parameters.
    pub(super) parameters: Digest,
    /// What that took.
    pub(super) took: Aggregation,
}

/// A leaf of the work at hand.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Leaf {
    /// Who is to compute it.
    assigned: Option<MemberId>,
    /// Who was the first to deliver it.
    credited: Option<MemberId>,
    /// Digest of the samples that were used.
    digest: Option<Digest>,
}

/// A round or an evaluation under way.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    pub(super) work: Work,
    pub(super) started: Duration,
    tree: Tree,
    leaves: Vec<Leaf>,
    /// Nodes that were announced, and are credited when their last chunk is there.
    announced: Vec<(MemberId, NodeReport)>,
    totals: Reduction<Totals>,
    /// The new parameters, which may be made before the last node that they were made of is credited.
    pub(super) reduced: Option<Reduced>,
    pub(super) longest_compute: Duration,
    /// The longest that an assignment waited for its parameters.
    pub(super) longest_download: Duration,
}

impl Progress {
    pub(super) fn new(work: Work, tree: Tree, started: Duration) -> Self {
        Self {
            work,
            started,
            tree,
            leaves: vec![Leaf::default(); tree.shards() as usize],
            announced: Vec::new(),
            totals: Reduction::new(tree),
            reduced: None,
            longest_compute: Duration::ZERO,
            longest_download: Duration::ZERO,
        }
    }

    /// Leaves that nobody has delivered and nobody is computing, ascending.
    pub(super) fn unassigned(&self) -> Vec<u32> {
        self.leaves_where(|leaf| leaf.credited.is_none() && leaf.assigned.is_none())
    }

    /// Leaves that `member` is to compute and nobody has delivered, ascending.
    pub(super) fn outstanding(&self, member: MemberId) -> Vec<u32> {
        self.leaves_where(|leaf| leaf.credited.is_none() && leaf.assigned == Some(member))
    }

    fn leaves_where(&self, wanted: impl Fn(&Leaf) -> bool) -> Vec<u32> {
        (0..).zip(&self.leaves).filter(|(_, leaf)| wanted(leaf)).map(|(i, _)| i).collect()
    }

    pub(super) fn assign(&mut self, leaves: &[u32], member: MemberId) {
        for &leaf in leaves {
            self.leaves[leaf as usize].assigned = Some(member);
        }
    }

    /// Takes a member's leaves away. What it has delivered stays, and so do its announcements: the rest of an announced
    /// node may be on its way from a connection that is gone, and is as good as anybody's.
    pub(super) fn forget(&mut self, member: MemberId) {
        for leaf in &mut self.leaves {
            if leaf.assigned == Some(member) {
                leaf.assigned = None;
            }
        }
    }

    /// Notes that a member is about to send a node.
    pub(super) fn announce(&mut self, member: MemberId, report: NodeReport) {
        self.announced.push((member, report));
    }

    /// Credits an announced node whose content is complete. Returns the number of leaves that are new, or `None` when
    /// the node was not announced.
    pub(super) fn credit(&mut self, member: MemberId, node: NodeId) -> Option<u32> {
        let at = self.announced.iter().position(|(by, report)| *by == member && report.node == node)?;
        let (_, report) = self.announced.swap_remove(at);
        let mut new = 0;
        for (leaf, digest) in node.leaves().zip(&report.digests) {
            let leaf = &mut self.leaves[leaf as usize];
            if leaf.credited.is_none() {
                leaf.credited = Some(member);
                leaf.digest = Some(*digest);
                new += 1;
            }
        }
        let totals = Totals { loss: report.loss, samples: report.samples };
        self.totals.insert(node, totals, |left, right| Totals {
            loss: left.loss + right.loss,
            samples: left.samples + right.samples,
        });
        self.longest_compute = self.longest_compute.max(report.compute);
        self.longest_download = self.longest_download.max(report.waited);
        Some(new)
    }

    /// Loss and samples of the whole, once every leaf is delivered.
    pub(super) fn complete(&self) -> Option<Totals> {
        self.totals.root().copied()
    }

    /// Who delivered what, as the fewest nodes from left to right.
    pub(super) fn contributions(&self) -> Vec<Contribution> {
        let mut contributions = Vec::new();
        let mut start = 0u32;
        for run in self.leaves.chunk_by(|a, b| a.credited == b.credited) {
            let end = start + run.len() as u32;
            if let Some(by) = run[0].credited {
                contributions.extend(self.tree.cover(start..end).into_iter().map(|node| Contribution { by, node }));
            }
            start = end;
        }
        contributions
    }

    /// The digests of all leaves, once every leaf is delivered.
    pub(super) fn digests(&self) -> Vec<Digest> {
        self.leaves.iter().filter_map(|leaf| leaf.digest).collect()
    }

    /// Members that delivered something.
    pub(super) fn contributors(&self) -> u32 {
        let mut members: Vec<MemberId> = self.leaves.iter().filter_map(|leaf| leaf.credited).collect();
        members.sort_unstable();
        members.dedup();
        members.len() as u32
    }
}
