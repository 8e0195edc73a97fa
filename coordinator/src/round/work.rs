//! The piece of work at hand: which leaves are assigned to whom, and which are done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_common::hash::Digest;
use lockstep_common::ledger::Contribution;
use lockstep_common::progress::Aggregation;
use lockstep_common::protocol::{Finding, MemberId, NodeReport, Work};
use lockstep_common::reduce::{NodeId, Reduction, Tree};

use super::check::Check;
use super::membership::median;

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
    /// Digest of the new parameters, or of those that stay.
    pub(super) parameters: Digest,
    /// Whether there are new ones.
    pub(super) stepped: bool,
    /// What that took.
    pub(super) took: Aggregation,
}

/// A leaf of the work at hand.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Leaf {
    /// Who is to compute it, and since when.
    assigned: Option<(MemberId, Duration)>,
    /// Who is to compute it as well, because others are late with it; the newest, and since when.
    copy: Option<(MemberId, Duration)>,
    /// Whether it was ever given to a second member because the first was late.
    hedged: bool,
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
    /// What an inspection has found in the lowest leaf so far.
    finding: Option<Finding>,
    /// The new parameters, which may be made before the last node that they were made of is credited.
    pub(super) reduced: Option<Reduced>,
    pub(super) longest_compute: Duration,
    /// The longest that an assignment waited for its parameters.
    pub(super) longest_download: Duration,
    /// How many seconds the members took that are done with their parts.
    finished: BTreeMap<MemberId, f64>,
    /// Whether people were told that nobody is left to compute.
    pub(super) deserted: bool,
    /// Leaves that are computed twice.
    pub(super) checks: Vec<Check>,
    /// Members whose nodes are kept out of the sum until their checks are over.
    pub(super) held: BTreeSet<MemberId>,
    /// A leaf whose check waits for somebody to decide.
    pub(super) undecided: Option<u32>,
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
            finding: None,
            reduced: None,
            longest_compute: Duration::ZERO,
            longest_download: Duration::ZERO,
            finished: BTreeMap::new(),
            deserted: false,
            checks: Vec::new(),
            held: BTreeSet::new(),
            undecided: None,
        }
    }

    /// Whether this is a round, and not an evaluation.
    pub(super) fn is_round(&self) -> bool {
        matches!(self.work, Work::Gradient { .. })
    }

    /// Leaves that nobody has delivered and nobody is computing, ascending.
    pub(super) fn unassigned(&self) -> Vec<u32> {
        self.leaves_where(|leaf| leaf.credited.is_none() && leaf.assigned.is_none())
    }

    /// Leaves that `member` is to compute and nobody has delivered, ascending.
    pub(super) fn outstanding(&self, member: MemberId) -> Vec<u32> {
        let theirs = |holder: Option<(MemberId, Duration)>| holder.is_some_and(|(id, _)| id == member);
        self.leaves_where(|leaf| leaf.credited.is_none() && (theirs(leaf.assigned) || theirs(leaf.copy)))
    }

    /// Leaves that everybody who computes them has had for longer than `limit`, each with the first who was given it.
    pub(super) fn late(&self, now: Duration, limit: Duration) -> Vec<(u32, MemberId)> {
        let late = |(i, leaf): (u32, &Leaf)| {
            let (member, since) = leaf.assigned.filter(|_| leaf.credited.is_none())?;
            let newest = leaf.copy.map_or(since, |(_, since)| since);
            (now.saturating_sub(newest) > limit).then_some((i, member))
        };
        (0..).zip(&self.leaves).filter_map(late).collect()
    }

    /// A member has nothing left to deliver and took so long; the first time counts, when it is done with its own part.
    pub(super) fn note_finish(&mut self, member: MemberId, took: Duration) {
        self.finished.entry(member).or_insert(took.as_secs_f64());
    }

    /// The median of what members took for their parts; `None` before the first is done.
    pub(super) fn typical_finish(&self) -> Option<Duration> {
        median(self.finished.values().copied().collect()).map(Duration::from_secs_f64)
    }

    /// The leaves that were given to a second member because the first was late, ascending.
    pub(super) fn hedged(&self) -> Vec<u32> {
        self.leaves_where(|leaf| leaf.hedged)
    }

    fn leaves_where(&self, wanted: impl Fn(&Leaf) -> bool) -> Vec<u32> {
        (0..).zip(&self.leaves).filter(|(_, leaf)| wanted(leaf)).map(|(i, _)| i).collect()
    }

    /// Notes that `member` is to compute leaves: as the only one, or beside one who is late.
    pub(super) fn assign(&mut self, now: Duration, leaves: &[u32], member: MemberId) {
        for &leaf in leaves {
            let leaf = &mut self.leaves[leaf as usize];
            if leaf.assigned.is_none() {
                leaf.assigned = Some((member, now));
            } else {
                leaf.copy = Some((member, now));
                leaf.hedged = true;
            }
        }
    }

    /// Takes a member's leaves away. What it has delivered stays, and so do its announcements: the rest of an announced
    /// node may be on its way from a connection that is gone, and is as good as anybody's.
    pub(super) fn forget(&mut self, member: MemberId) {
        self.checks.iter_mut().for_each(|check| check.forget(member));
        for leaf in &mut self.leaves {
            let others = |holder: &(MemberId, Duration)| holder.0 != member;
            leaf.copy = leaf.copy.filter(others);
            leaf.assigned = leaf.assigned.filter(others).or_else(|| leaf.copy.take());
        }
    }

    /// Whether a member is to compute a leaf, which nobody may have delivered yet.
    pub(super) fn computes(&self, member: MemberId, leaf: u32) -> bool {
        self.holders_since(leaf).any(|(id, _)| id == member)
    }

    /// Who is to compute a leaf, and since when.
    pub(super) fn holders_since(&self, leaf: u32) -> impl Iterator<Item = (MemberId, Duration)> {
        let leaf = &self.leaves[leaf as usize];
        [leaf.assigned, leaf.copy].into_iter().flatten()
    }

    /// Whether a member takes part in a check that is not over.
    pub(super) fn is_checked(&self, member: MemberId) -> bool {
        let open = self.checks.iter().filter(|check| check.is_open());
        open.into_iter().any(|check| check.involves(member) || self.computes(member, check.leaf()))
    }

    /// Leaves that two workers computed alike, ascending.
    pub(super) fn checked(&self) -> Vec<u32> {
        self.checks.iter().filter(|check| check.is_agreed()).map(Check::leaf).collect()
    }

    /// Drops a member's announcements: what it announced will not be in the sum.
    pub(super) fn retract(&mut self, member: MemberId) {
        self.announced.retain(|(by, _)| *by != member);
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
        if let Some(finding) = report.finding
            && self.finding.as_ref().is_none_or(|found| finding.leaf < found.leaf)
        {
            self.finding = Some(finding);
        }
        let totals = Totals { loss: report.loss, samples: report.samples };
        self.totals.insert(node, totals, |left, right| Totals {
            loss: left.loss + right.loss,
            samples: left.samples + right.samples,
        });
        self.longest_compute = self.longest_compute.max(report.compute.unwrap_or_default());
        self.longest_download = self.longest_download.max(report.waited);
        Some(new)
    }

    /// What an inspection has found in the lowest leaf that is not finite.
    pub(super) fn finding(&self) -> Option<&Finding> {
        self.finding.as_ref()
    }

    /// Who delivered a leaf.
    pub(super) fn deliverer(&self, leaf: u32) -> Option<MemberId> {
        self.leaves.get(leaf as usize)?.credited
    }

    /// Notes that the gradient of an announced node is computed, or returns `None` when the node was not announced.
    pub(super) fn computed(&mut self, member: MemberId, node: NodeId, compute: Duration) -> Option<()> {
        let (_, report) = self.announced.iter_mut().find(|(by, report)| *by == member && report.node == node)?;
        report.compute = Some(compute);
        Some(())
    }

    /// Announced nodes that are computed and not there yet, by their numbers of leaves.
    pub(super) fn computed_leaves(&self) -> Vec<(MemberId, u32)> {
        let computed = self.announced.iter().filter(|(_, report)| report.compute.is_some());
        computed.map(|(member, report)| (*member, report.digests.len() as u32)).collect()
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
