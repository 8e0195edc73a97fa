//! A worker process of the simulation: it takes nodes one by one, and can be frozen, cut off, slow, stuck or wrong.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use lockstep_common::protocol::{MemberId, Work};
use lockstep_common::reduce::{NodeId, Tree};

pub struct Worker {
    pub member: Option<MemberId>,
    pub leaf_time: Duration,
    /// Gives signs of life, computes nothing.
    pub stuck: bool,
    /// Computes wrong bits.
    pub corrupt: bool,
    pub versions: BTreeMap<u64, u64>,
    tasks: VecDeque<(Work, NodeId)>,
    newest: Option<Work>,
    busy: Option<(u64, Work, NodeId)>,
    jobs: u64,
    frozen: bool,
    cut_off: bool,
    missed: bool,
}

/// A node that a worker has computed.
pub struct Computed {
    pub member: MemberId,
    pub work: Work,
    pub node: NodeId,
    /// What it was computed from.
    pub parameters: u64,
    /// Whether the work is not over, by what the worker knows.
    pub wanted: bool,
}

impl Worker {
    pub fn new(leaf_time: Duration) -> Self {
        Self {
            member: None,
            leaf_time,
            stuck: false,
            corrupt: false,
            versions: BTreeMap::new(),
            tasks: VecDeque::new(),
            newest: None,
            busy: None,
            jobs: 0,
            frozen: false,
            cut_off: false,
            missed: false,
        }
    }

    pub fn is_reachable(&self) -> bool {
        !self.frozen && !self.cut_off
    }

    /// Messages were lost on a connection: it is broken, and will be seen to be.
    pub fn missed_messages(&mut self) {
        self.missed = true;
    }

    pub fn must_reconnect(&self) -> bool {
        self.missed
    }

    pub fn stop(&mut self, frozen: bool) {
        if frozen {
            self.frozen = true;
        } else {
            self.cut_off = true;
        }
        // What it had sent and what was on its way is lost; what it computes is not delivered.
        self.missed = true;
        self.busy = None;
    }

    pub fn resume(&mut self) {
        (self.frozen, self.cut_off) = (false, false);
    }

    pub fn admitted(&mut self, member: MemberId) {
        self.left();
        self.member = Some(member);
    }

    pub fn left(&mut self) {
        self.member = None;
        self.versions.clear();
        self.tasks.clear();
        (self.newest, self.busy, self.missed) = (None, None, false);
    }

    pub fn assigned(&mut self, work: Work, tasks: Vec<(u32, bool)>, tree: Tree) {
        let leaves: Vec<u32> = tasks.into_iter().map(|(leaf, _)| leaf).collect();
        self.newest = self.newest.filter(|newest| newest.place() > work.place()).or(Some(work));
        self.tasks.extend(tree.cover_set(&leaves).into_iter().map(|node| (work, node)));
    }

    /// Starts with the next node, if there is one and its parameters are there: the job's number, and how long it takes.
    pub fn next(&mut self) -> Option<(u64, Duration)> {
        let (newest, versions) = (self.newest, &self.versions);
        self.tasks.retain(|(work, _)| newest.is_none_or(|newest| newest.place() <= work.place()));
        if self.busy.is_some() || self.stuck || !self.is_reachable() {
            return None;
        }
        let at = self.tasks.iter().position(|(work, _)| versions.contains_key(&work.version()))?;
        let (work, node) = self.tasks.remove(at)?;
        self.jobs += 1;
        self.busy = Some((self.jobs, work, node));
        Some((self.jobs, self.leaf_time * node.leaves().len() as u32))
    }

    /// A job's time is over.
    pub fn done(&mut self, job: u64) -> Option<Computed> {
        let (_, work, node) = self.busy.take_if(|(at, ..)| *at == job)?;
        let parameters = *self.versions.get(&work.version())?;
        let wanted = self.newest.is_none_or(|newest| newest.place() <= work.place());
        Some(Computed { member: self.member?, work, node, parameters, wanted })
    }
}
