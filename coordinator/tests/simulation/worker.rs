//! A worker process of the simulation: it takes nodes one by one, and can be frozen, cut off, slow, stuck or wrong.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use lockstep_common::protocol::{Handing, MemberId, Work};
use lockstep_common::reduce::{NodeId, Tree};
use lockstep_coordinator::round::Task;

pub(crate) struct Worker {
    pub(crate) member: Option<MemberId>,
    pub(crate) leaf_time: Duration,
    /// Gives signs of life, computes nothing.
    pub(crate) stuck: bool,
    /// Computes wrong bits.
    pub(crate) corrupt: bool,
    pub(crate) versions: BTreeMap<u64, u64>,
    tasks: VecDeque<(Work, NodeId, Handing)>,
    newest: Option<Work>,
    busy: Option<(u64, Work, NodeId, Handing)>,
    /// Whether the node at hand is announced already.
    announced: bool,
    jobs: u64,
    frozen: bool,
    cut_off: bool,
    missed: bool,
}

/// A node that a worker has computed.
pub(crate) struct Computed {
    pub(crate) member: MemberId,
    pub(crate) work: Work,
    pub(crate) node: NodeId,
    pub(crate) handing: Handing,
    /// What it was computed from.
    pub(crate) parameters: u64,
    /// Whether the work is not over, by what the worker knows.
    pub(crate) wanted: bool,
    /// Whether it was announced before it was computed.
    pub(crate) announced: bool,
}

impl Worker {
    pub(crate) fn new(leaf_time: Duration) -> Self {
        Self {
            member: None,
            leaf_time,
            stuck: false,
            corrupt: false,
            versions: BTreeMap::new(),
            tasks: VecDeque::new(),
            newest: None,
            busy: None,
            announced: false,
            jobs: 0,
            frozen: false,
            cut_off: false,
            missed: false,
        }
    }

    pub(crate) fn is_reachable(&self) -> bool {
        !self.frozen && !self.cut_off
    }

    /// Messages were lost on a connection: it is broken, and will be seen to be.
    pub(crate) fn missed_messages(&mut self) {
        self.missed = true;
    }

    pub(crate) fn must_reconnect(&self) -> bool {
        self.missed
    }

    pub(crate) fn stop(&mut self, frozen: bool) {
        if frozen {
            self.frozen = true;
        } else {
            self.cut_off = true;
        }
        // What it had sent and what was on its way is lost; what it computes is not delivered.
        self.missed = true;
        self.busy = None;
    }

    pub(crate) fn resume(&mut self) {
        (self.frozen, self.cut_off) = (false, false);
    }

    pub(crate) fn admitted(&mut self, member: MemberId) {
        self.left();
        self.member = Some(member);
    }

    pub(crate) fn left(&mut self) {
        self.member = None;
        self.versions.clear();
        self.tasks.clear();
        (self.newest, self.busy, self.missed) = (None, None, false);
    }

    pub(crate) fn assigned(&mut self, work: Work, tasks: Vec<Task>, tree: Tree) {
        self.newest = self.newest.filter(|newest| newest.place() > work.place()).or(Some(work));
        let (summed, single): (Vec<Task>, Vec<Task>) =
            tasks.into_iter().partition(|task| task.handing == Handing::Summed);
        let leaves: Vec<u32> = summed.iter().map(|task| task.leaf).collect();
        self.tasks.extend(tree.cover_set(&leaves).into_iter().map(|node| (work, node, Handing::Summed)));
        self.tasks.extend(single.into_iter().map(|task| (work, NodeId::leaf(task.leaf), task.handing)));
    }

    /// Starts with the next node, if there is one and its parameters are there: the job's number, and how long it takes.
    pub(crate) fn next(&mut self) -> Option<(u64, Duration)> {
        let (newest, versions) = (self.newest, &self.versions);
        self.tasks.retain(|(work, ..)| newest.is_none_or(|newest| newest.place() <= work.place()));
        if self.busy.is_some() || self.stuck || !self.is_reachable() {
            return None;
        }
        let at = self.tasks.iter().position(|(work, ..)| versions.contains_key(&work.version()))?;
        let (work, node, handing) = self.tasks.remove(at)?;
        self.jobs += 1;
        self.announced = false;
        self.busy = Some((self.jobs, work, node, handing));
        Some((self.jobs, self.leaf_time * node.leaves().len() as u32))
    }

    /// Announces the gradient at hand before it is computed, if there is one that may be.
    pub(crate) fn announce(&mut self) -> Option<Computed> {
        let (job, work, _, handing) = self.busy?;
        let may_be = matches!(work, Work::Gradient { .. }) && handing == Handing::Summed;
        let announced = self.at_hand(job).filter(|_| may_be)?;
        self.announced = true;
        Some(announced)
    }

    /// A job's time is over.
    pub(crate) fn done(&mut self, job: u64) -> Option<Computed> {
        let computed = self.at_hand(job);
        self.busy.take_if(|(at, ..)| *at == job);
        computed
    }

    fn at_hand(&self, job: u64) -> Option<Computed> {
        let (_, work, node, handing) = self.busy.filter(|(at, ..)| *at == job)?;
        let parameters = *self.versions.get(&work.version())?;
        let wanted = self.newest.is_none_or(|newest| newest.place() <= work.place());
        Some(Computed { member: self.member?, work, node, handing, parameters, wanted, announced: self.announced })
    }
}
