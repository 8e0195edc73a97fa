//! A world around the real machine: simulated time, a network with delays and partitions, workers that compute integers.
//!
//! The coordinator can be killed and started again: see `restart.rs`.
//!
//! A leaf's "gradient" is a number made of the round, the leaf and the parameters; siblings are combined by a function
//! that is neither commutative nor associative, so that a sum of other nodes, or in another order, ends in another hash.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_common::config::{DataFacts, RunConfig, RunSpec};
use lockstep_common::data::Dtype;
use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::hash::Digest;
use lockstep_common::ledger::{Chain, Header};
use lockstep_common::model;
use lockstep_common::progress::{Aggregation, Event as Progressed, RoundReport};
use lockstep_common::protocol::{Handing, JoinRequest, MemberId, NodeReport, Refusal, Work};
use lockstep_common::reduce::{NodeId, Reduction};
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shape::Shape;
use lockstep_coordinator::expected::ExpectedSamples;
use lockstep_coordinator::round::{ConnectionId, Effect, Event, Machine, MachineConfig, Outcome, Rejected, ToMember};

use crate::restart::{Disk, Snapshot};
use crate::worker::{Computed, Worker};

/// Parts of a gradient.
const CHUNKS: usize = 2;
/// How often the driver ticks.
const TICK: Duration = Duration::from_millis(10);
/// A run that is not over by then, whatever happened to it, hangs.
const DEADLINE: Duration = Duration::from_secs(900);

/// Whose reports come on a lane of their own.
const AGGREGATOR: MemberId = MemberId { worker: 0, incarnation: 0 };

/// A worker process, by its number.
pub(crate) type Process = u64;

/// What will happen at some time.
#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Tick,
    /// Something reaches the coordinator.
    Arrives(Event),
    /// A part of a node's gradient reaches the aggregator.
    Chunk {
        member: MemberId,
        round: u64,
        node: NodeId,
        chunk: usize,
        value: u64,
    },
    /// Something reaches a worker.
    Told(MemberId, ToMember, Option<u64>),
    /// New parameters reach a worker.
    Parameters(MemberId, u64, u64),
    /// A worker gives a sign of life, or looks whether its coordinator still does.
    Pulse(Process),
    /// A worker is done with a node, if it is still at it.
    Done(Process, u64),
    /// A worker asks to join.
    Join(Process),
    Fault(Fault),
    /// A frozen or cut off worker is back.
    Back(Process),
    /// A checkpoint is on the disk, or is not.
    Written(Box<Snapshot>, bool),
    /// The coordinator is started again.
    Up,
}

impl Happening {
    /// Whether it travels on the connection for bulk data.
    fn is_bulk(&self) -> bool {
        matches!(
            self,
            Self::Arrives(Event::Announced(..) | Event::Computed { .. } | Event::Compared(..))
                | Self::Chunk { .. }
                | Self::Told(_, ToMember::Parameters(_), _)
                | Self::Parameters(..)
        )
    }

    /// Whether it is lost when the coordinator is killed.
    pub(crate) fn is_of_coordinator(&self) -> bool {
        matches!(self, Self::Arrives(_) | Self::Chunk { .. } | Self::Written(..))
    }
}

/// What goes wrong, or at least changes, with a worker.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Start,
    Crash(Process),
    Restart(Process),
    Freeze(Process, Duration),
    CutOff(Process, Duration),
    Slow(Process, u32),
    Fast(Process, u32),
    Stick(Process),
    Corrupt(Process),
    Drain(Process),
    /// The coordinator is killed, and started again after some time; its newest checkpoint may be damaged by that.
    KillCoordinator {
        down: Duration,
        damage: bool,
    },
    /// An old message comes once more.
    Repeat,
}

pub(crate) struct World {
    pub(crate) spec: RunSpec,
    pub(crate) now: Duration,
    pub(crate) random: Stream,
    pub(crate) workers: BTreeMap<Process, Worker>,
    pub(crate) records: String,
    pub(crate) rounds: Vec<RoundReport>,
    pub(crate) notices: Vec<String>,
    pub(crate) left: Vec<(MemberId, String)>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) parameters: Tensors,
    pub(crate) seed: u64,
    /// Whether some messages take long.
    pub(crate) stalls: bool,
    /// There is none while the coordinator is down.
    pub(crate) machine: Option<Machine>,
    /// When the coordinator was started for the last time: its clock begins there.
    pub(crate) born: Duration,
    pub(crate) restarts: u32,
    pub(crate) disk: Disk,
    /// How long the coordinator is down after it has dismissed everybody, if it is killed then.
    pub(crate) kill_at_end: Option<Duration>,
    /// Whether that has happened.
    pub(crate) dismissed: bool,
    expected: ExpectedSamples,
    pub(crate) queue: BTreeMap<(Duration, u64), Happening>,
    scheduled: u64,
    /// When the last message of each connection arrives, up or down, for bulk data or not: none overtakes another on the
    /// same one.
    lanes: BTreeMap<(MemberId, bool, bool), Duration>,
    joining: BTreeMap<ConnectionId, Process>,
    connections: u64,
    processes: Process,
    /// Members whose connection is still there.
    pub(crate) connected: BTreeSet<MemberId>,
    /// Everybody who was ever a member.
    members: BTreeSet<MemberId>,
    pub(crate) chain: Chain,
    pub(crate) sums: Option<Sums>,
    pub(crate) made: Option<Tensors>,
    past: Vec<Event>,
}

/// The parameters and the optimizer's moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tensors {
    pub(crate) parameters: u64,
    pub(crate) moments: u64,
}

impl Tensors {
    pub(crate) const INITIAL: Self = Self { parameters: 1, moments: 0 };

    /// The optimizer's step.
    fn step(self, roots: &[u64]) -> Self {
        let moments = roots.iter().fold(self.moments, |moments, &root| mix(moments, root));
        Self { parameters: mix(self.parameters, moments), moments }
    }
}

/// The aggregator.
pub(crate) struct Sums {
    round: u64,
    parts: Vec<Reduction<u64>>,
    awaited: BTreeMap<(MemberId, NodeId), [bool; CHUNKS]>,
    held: BTreeMap<MemberId, Vec<(NodeId, usize, u64)>>,
    reduced: bool,
}

pub(crate) fn spec(shards: u32, set: impl FnOnce(&mut RunConfig)) -> RunSpec {
    let mut config =
        RunConfig { name: Some("sim".into()), epochs: 2, batch_size: 16.max(shards), shards, ..RunConfig::default() };
    set(&mut config);
    let data = DataFacts {
        name: "sim".into(),
        sample_shape: Shape::new([28, 28]),
        dtype: Dtype::U8,
        training_samples: 6 * config.batch_size - 5,
        validation_samples: 3 * shards / 2,
    };
    config.resolve(model::preset("conv").unwrap(), &data).unwrap()
}

pub(crate) fn mix(a: u64, b: u64) -> u64 {
    Digest::of(&[a.to_le_bytes(), b.to_le_bytes()].concat()).0 as u64
}

/// The gradient of a chunk of a leaf.
pub(crate) fn leaf_value(parameters: u64, round: u64, leaf: u32, chunk: usize) -> u64 {
    mix(mix(parameters, round), u64::from(leaf) << 8 | chunk as u64)
}

pub(crate) fn node_value(parameters: u64, round: u64, node: NodeId, chunk: usize) -> u64 {
    match node.children() {
        None => leaf_value(parameters, round, node.index, chunk),
        Some([left, right]) => {
            mix(node_value(parameters, round, left, chunk), node_value(parameters, round, right, chunk))
        }
    }
}

/// What a run must end with.
pub(crate) fn right_parameters(spec: &RunSpec) -> Tensors {
    (0..spec.total_rounds()).fold(Tensors::INITIAL, |tensors, round| {
        let root = spec.schedule.tree.root();
        let roots: Vec<u64> = (0..CHUNKS).map(|chunk| node_value(tensors.parameters, round, root, chunk)).collect();
        tensors.step(&roots)
    })
}

impl World {
    pub(crate) fn new(spec: RunSpec, seed: u64) -> Self {
        let layout = spec.model.layout.hash();
        let (chain, header) = Chain::start(&Header::new("sim", &spec.schedule, layout, Digest(1)));
        let mut world = Self {
            machine: None,
            born: Duration::ZERO,
            restarts: 0,
            disk: Disk::default(),
            kill_at_end: None,
            dismissed: false,
            expected: ExpectedSamples::new(spec.schedule, spec.validation_samples),
            spec,
            now: Duration::ZERO,
            random: Stream::new(seed, Purpose::SelfTest, 1, 0),
            seed,
            stalls: false,
            workers: BTreeMap::new(),
            records: header,
            rounds: Vec::new(),
            notices: Vec::new(),
            left: Vec::new(),
            outcome: None,
            parameters: Tensors::INITIAL,
            queue: BTreeMap::new(),
            scheduled: 0,
            lanes: BTreeMap::new(),
            joining: BTreeMap::new(),
            connections: 0,
            processes: 0,
            connected: BTreeSet::new(),
            members: BTreeSet::new(),
            chain,
            sums: None,
            made: None,
            past: Vec::new(),
        };
        world.machine = Some(Machine::new(world.config()));
        world.after(TICK, Happening::Tick);
        world
    }

    pub(crate) fn config(&self) -> MachineConfig {
        MachineConfig { spec: self.spec.clone(), version: "1".into(), fingerprint: Digest(1) }
    }

    pub(crate) fn after(&mut self, delay: Duration, what: Happening) {
        self.scheduled += 1;
        self.queue.insert((self.now + delay, self.scheduled), what);
    }

    pub(crate) fn millis(&mut self, from: u32, below: u32) -> Duration {
        Duration::from_millis(u64::from(from + self.random.below(below - from)))
    }

    /// A message's way: mostly short, sometimes long.
    fn delay(&mut self) -> Duration {
        match self.random.below(50) {
            0 if self.stalls => self.millis(5, 200),
            _ => Duration::from_micros(u64::from(200 + self.random.below(2000))),
        }
    }

    /// Schedules a message on a member's connection. It comes after those before it; it is lost if the connection is.
    fn on_lane(&mut self, member: MemberId, up: bool, what: Happening) {
        if member != AGGREGATOR && !self.connected.contains(&member) {
            return;
        }
        let at = self.now + self.delay();
        let last = self.lanes.entry((member, up, what.is_bulk())).or_default();
        *last = at.max(*last);
        let delay = last.saturating_sub(self.now);
        self.after(delay, what);
    }

    /// Starts a worker process.
    pub(crate) fn start(&mut self, leaf_time: Duration) -> Process {
        self.processes += 1;
        let process = self.processes;
        self.workers.insert(process, Worker::new(leaf_time));
        let delay = self.delay();
        self.after(delay, Happening::Join(process));
        self.after(self.spec.heartbeat_interval, Happening::Pulse(process));
        process
    }

    /// Runs until the run ends.
    pub(crate) fn run(&mut self) {
        while self.outcome.is_none() {
            let ((at, _), what) = self.queue.pop_first().expect("there is always a next tick");
            self.now = at;
            assert!(
                at < DEADLINE,
                "seed {}: it hangs after {} rounds: {:?}",
                self.seed,
                self.rounds.len(),
                self.notices
            );
            self.happen(what);
        }
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Tick => {
                self.event(Event::Tick);
                self.after(TICK, Happening::Tick);
            }
            Happening::Arrives(event) => {
                self.past.push(event.clone());
                self.event(event);
            }
            Happening::Chunk { member, round, node, chunk, value } => self.chunk(member, round, node, chunk, value),
            Happening::Told(member, message, version) => self.told(member, message, version),
            Happening::Parameters(member, version, value) => {
                if let Some(worker) = self.reachable(member) {
                    worker.versions.insert(version, value);
                    self.work_on(member);
                }
            }
            Happening::Pulse(process) => self.pulse(process),
            Happening::Done(process, job) => self.done(process, job),
            Happening::Join(process) => self.join(process),
            Happening::Fault(fault) => self.fault(fault),
            Happening::Back(process) => self.back(process),
            Happening::Written(snapshot, whole) => self.written(*snapshot, whole),
            Happening::Up => self.up(),
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        // Nobody is there to hear it while the coordinator is down.
        let Some(machine) = &mut self.machine else { return };
        match machine.step(self.now - self.born, event) {
            Ok(effects) => effects.into_iter().for_each(|effect| self.perform(effect)),
            Err(
                Rejected::NotAMember(_)
                | Rejected::Stale { .. }
                | Rejected::Unexpected(..)
                | Rejected::OldCheckpoint(_)
                | Rejected::Finished,
            ) => {}
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Admit(connection, member) => {
                let process = self.joining.remove(&connection).expect("a join is answered once");
                assert!(self.members.insert(member), "seed {}: {member} was there before", self.seed);
                self.connected.insert(member);
                match self.workers.get_mut(&process) {
                    Some(worker) if worker.is_reachable() => worker.admitted(member),
                    // The connection of a worker that is gone breaks.
                    _ => self.after(Duration::from_millis(3), Happening::Arrives(Event::Lost(member, "gone".into()))),
                }
            }
            Effect::Refuse(connection, refusal) => {
                let process = self.joining.remove(&connection).expect("a join is answered once");
                let expected = matches!(refusal, Refusal::Finished { .. } | Refusal::Barred { .. });
                assert!(expected, "seed {}: {refusal}", self.seed);
                self.workers.remove(&process);
            }
            Effect::Send(member, message) => {
                let version = matches!(message, ToMember::Parameters(_)).then_some(self.parameters.parameters);
                self.on_lane(member, false, Happening::Told(member, message, version));
            }
            Effect::Close(member) => drop(self.connected.remove(&member)),
            Effect::Begin { round, .. } => {
                assert_eq!(round, self.rounds.len() as u64, "seed {}: rounds begin in order", self.seed);
                let parts = vec![Reduction::new(self.spec.schedule.tree); CHUNKS];
                self.sums =
                    Some(Sums { round, parts, awaited: BTreeMap::new(), held: BTreeMap::new(), reduced: false });
            }
            Effect::Skip { round } => panic!("seed {}: round {round} is finite", self.seed),
            Effect::Expect(member, node, _) => {
                let sums = self.sums.as_mut().expect("a round was begun");
                sums.awaited.insert((member, node), [false; CHUNKS]);
            }
            Effect::Hold(member, node, _) => {
                let sums = self.sums.as_mut().expect("a round was begun");
                sums.awaited.insert((member, node), [false; CHUNKS]);
                sums.held.entry(member).or_default();
            }
            Effect::Release(member) => {
                let sums = self.sums.as_mut().expect("a round was begun");
                let (round, held) = (sums.round, sums.held.remove(&member).unwrap_or_default());
                held.into_iter().for_each(|(node, chunk, value)| self.chunk(member, round, node, chunk, value));
            }
            Effect::Discard(member) => {
                let sums = self.sums.as_mut().expect("a round was begun");
                sums.awaited.retain(|(id, _), _| *id != member);
                sums.held.remove(&member);
            }
            Effect::Record(record) => {
                self.records.push('\n');
                self.records.push_str(&self.chain.line(&record));
                self.parameters = self.made.take().expect("a round is committed when its parameters are made");
            }
            Effect::Publish(Progressed::Round(round)) => {
                assert_eq!(round.round, self.rounds.len() as u64, "seed {}: rounds are in order", self.seed);
                self.rounds.push(round);
            }
            Effect::Publish(Progressed::Notice { message }) => self.notices.push(message),
            Effect::Publish(Progressed::Left { member, reason }) => self.left.push((member, reason)),
            Effect::Publish(_) => {}
            Effect::Checkpoint(id, standing, occasion) => self.checkpoint(id, *standing, occasion),
            Effect::Finish(outcome) => match self.kill_at_end.take() {
                Some(down) => {
                    self.dismissed = true;
                    self.kill_coordinator(down, false);
                }
                None => self.outcome = Some(outcome),
            },
        }
    }

    /// The aggregator takes a part of a node.
    fn chunk(&mut self, member: MemberId, round: u64, node: NodeId, chunk: usize, value: u64) {
        let Some(sums) = self.sums.as_mut().filter(|sums| sums.round == round) else { return };
        let Some(there) = sums.awaited.get_mut(&(member, node)) else { return };
        if let Some(held) = sums.held.get_mut(&member) {
            return held.push((node, chunk, value));
        }
        there[chunk] = true;
        let whole = there.iter().all(|&there| there);
        sums.parts[chunk].insert(node, value, mix);
        let roots: Option<Vec<u64>> = sums.parts.iter().map(|part| part.root().copied()).collect();
        let reduced = roots
            .filter(|_| !std::mem::replace(&mut sums.reduced, sums.parts.iter().all(|part| part.root().is_some())));
        // The aggregator has a queue of its own: what it reports comes a little later, in order.
        if whole {
            sums.awaited.remove(&(member, node));
            let event = Event::Arrived { member, work: Work::Gradient { round }, node };
            self.report(event);
        }
        if let Some(roots) = reduced {
            let made = self.parameters.step(&roots);
            self.made = Some(made);
            for member in self.machine.iter().flat_map(Machine::receivers).collect::<Vec<MemberId>>() {
                self.on_lane(member, false, Happening::Parameters(member, round + 1, made.parameters));
            }
            let parameters = Digest(u128::from(made.parameters));
            let took = Aggregation::default();
            self.report(Event::Reduced { round, gradient_norm: 1.0, parameters, stepped: true, took });
        }
    }

    fn report(&mut self, event: Event) {
        self.on_lane(AGGREGATOR, true, Happening::Arrives(event));
    }

    fn reachable(&mut self, member: MemberId) -> Option<&mut Worker> {
        self.workers.values_mut().find(|worker| worker.member == Some(member) && worker.is_reachable())
    }

    fn process_of(&self, member: MemberId) -> Option<Process> {
        self.workers.iter().find(|(_, worker)| worker.member == Some(member)).map(|(&process, _)| process)
    }

    fn told(&mut self, member: MemberId, message: ToMember, version: Option<u64>) {
        let Some(process) = self.process_of(member) else { return };
        let worker = self.workers.get_mut(&process).expect("just found");
        if !worker.is_reachable() {
            return worker.missed_messages();
        }
        match message {
            ToMember::Parameters(number) => {
                worker.versions.insert(number, version.expect("sent with the parameters"));
                self.work_on(member);
            }
            ToMember::Assign(work, tasks) => {
                worker.assigned(work, tasks, self.spec.schedule.tree);
                self.work_on(member);
            }
            ToMember::Keep(list) => {
                for &shard in &list.shards {
                    let cached = Happening::Arrives(Event::Cached(member, list.list, shard));
                    self.on_lane(member, true, cached);
                }
            }
            ToMember::Evicted(_) => self.join_again(process),
            ToMember::Finished(_) => drop(self.workers.remove(&process)),
        }
    }

    pub(crate) fn join_again(&mut self, process: Process) {
        if let Some(worker) = self.workers.get_mut(&process) {
            worker.left();
            let pause = self.millis(100, 400);
            self.after(pause, Happening::Join(process));
        }
    }

    /// A worker that is free takes its next node.
    fn work_on(&mut self, member: MemberId) {
        let Some(process) = self.process_of(member) else { return };
        let worker = self.workers.get_mut(&process).expect("just found");
        if let Some((job, takes)) = worker.next() {
            self.after(takes, Happening::Done(process, job));
            if self.random.below(2) == 0
                && let Some(computing) = self.workers.get_mut(&process).and_then(Worker::announce)
            {
                let report = NodeReport { compute: None, ..self.report_of(&computing, &[]) };
                self.on_lane(member, true, Happening::Arrives(Event::Announced(member, report)));
            }
        }
    }

    fn done(&mut self, process: Process, job: u64) {
        let Some(worker) = self.workers.get_mut(&process) else { return };
        let Some(computed) = worker.done(job) else { return };
        let (corrupt, member) = (worker.corrupt, computed.member);
        if worker.is_reachable() {
            self.deliver(computed, corrupt);
        }
        self.work_on(member);
    }

    /// What a worker says about a node that it has computed.
    fn deliver(&mut self, computed: Computed, corrupt: bool) {
        let Computed { member, work, node, handing, parameters, wanted, announced } = computed;
        let round = work.version();
        let values: Vec<u64> =
            (0..CHUNKS).map(|chunk| node_value(parameters, round, node, chunk) ^ u64::from(corrupt)).collect();
        let report = self.report_of(&computed, &values);
        if handing == Handing::Compared {
            return self.on_lane(member, true, Happening::Arrives(Event::Compared(member, report)));
        }
        let event = match report.compute {
            Some(compute) if announced => Event::Computed { member, work, node, compute },
            _ => Event::Announced(member, report),
        };
        self.on_lane(member, true, Happening::Arrives(event));
        if matches!(work, Work::Gradient { .. }) && wanted {
            for (chunk, value) in values.into_iter().enumerate() {
                self.on_lane(member, true, Happening::Chunk { member, round, node, chunk, value });
            }
        }
    }

    /// The report of a node whose gradient has these values.
    fn report_of(&mut self, computed: &Computed, values: &[u64]) -> NodeReport {
        let &Computed { work, node, handing, .. } = computed;
        let (mut samples, mut digests) = (0, Vec::new());
        for leaf in node.leaves() {
            let ids = self.expected.samples(work, leaf);
            samples += ids.len() as u32;
            digests.push(lockstep_common::shard::samples_digest(ids));
        }
        NodeReport {
            work,
            node,
            loss: 1.0,
            samples,
            digests,
            compute: Some(Duration::from_millis(1)),
            waited: Duration::ZERO,
            gradient: (handing != Handing::Summed)
                .then(|| Digest(values.iter().fold(0, |sum, &v| sum << 64 | u128::from(v)))),
            finding: None,
        }
    }

    fn pulse(&mut self, process: Process) {
        let Some(worker) = self.workers.get_mut(&process) else { return };
        let member = worker.member;
        // The connection of a member that is out, or that was cut off for some time, is seen to be dead.
        let lost = member.is_some_and(|member| !self.connected.contains(&member)) || worker.must_reconnect();
        let reachable = worker.is_reachable();
        self.after(self.spec.heartbeat_interval, Happening::Pulse(process));
        match member {
            Some(member) if reachable && lost => {
                self.after(Duration::from_millis(1), Happening::Arrives(Event::Lost(member, "reset".into())));
                self.join_again(process);
            }
            Some(member) if reachable => self.on_lane(member, true, Happening::Arrives(Event::Heartbeat(member))),
            _ => {}
        }
    }

    fn join(&mut self, process: Process) {
        let Some(worker) = self.workers.get(&process) else { return };
        if !worker.is_reachable() {
            return self.after(Duration::from_millis(300), Happening::Join(process));
        }
        if worker.member.is_some() {
            return;
        }
        if self.machine.is_none() {
            return self.join_again(process);
        }
        self.connections += 1;
        let connection = ConnectionId(self.connections);
        self.joining.insert(connection, process);
        let request = JoinRequest {
            process,
            name: format!("p{process}"),
            version: "1".into(),
            fingerprints: Fingerprints { f32: Digest(1), ..Fingerprints::default() },
            threads: 1,
            isa: "scalar".into(),
        };
        self.event(Event::Join { connection, request });
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Start => {
                let leaf_time = self.millis(2, 6);
                self.start(leaf_time);
            }
            Fault::Crash(process) | Fault::Restart(process) => {
                let Some(worker) = self.workers.remove(&process) else { return };
                if let Some(member) = worker.member {
                    self.on_lane(member, true, Happening::Arrives(Event::Lost(member, "killed".into())));
                }
                if matches!(fault, Fault::Restart(_)) {
                    self.start(worker.leaf_time);
                }
            }
            Fault::Freeze(process, time) | Fault::CutOff(process, time) => {
                let Some(worker) = self.workers.get_mut(&process) else { return };
                worker.stop(matches!(fault, Fault::Freeze(..)));
                self.after(time, Happening::Back(process));
            }
            Fault::Slow(process, times) => {
                self.workers.get_mut(&process).into_iter().for_each(|worker| worker.leaf_time *= times);
            }
            Fault::Fast(process, times) => {
                self.workers.get_mut(&process).into_iter().for_each(|worker| worker.leaf_time /= times);
            }
            Fault::Stick(process) => self.workers.get_mut(&process).into_iter().for_each(|worker| worker.stuck = true),
            Fault::Corrupt(process) => {
                self.workers.get_mut(&process).into_iter().for_each(|worker| worker.corrupt = true)
            }
            Fault::Drain(process) => {
                if let Some(member) = self.workers.get(&process).and_then(|worker| worker.member) {
                    self.on_lane(member, true, Happening::Arrives(Event::Drain(member)));
                }
            }
            Fault::KillCoordinator { down, damage } => self.kill_coordinator(down, damage),
            Fault::Repeat => self.repeat(),
        }
    }

    fn back(&mut self, process: Process) {
        let Some(worker) = self.workers.get_mut(&process) else { return };
        worker.resume();
        if let Some(member) = worker.member {
            self.work_on(member);
        }
    }

    /// An old message comes once more. A link or an aggregator repeats nothing by itself; a peer may.
    fn repeat(&mut self) {
        if self.past.is_empty() {
            return;
        }
        let at = self.random.below(self.past.len() as u32) as usize;
        let event = self.past[at].clone();
        if matches!(event, Event::Heartbeat(_) | Event::Cached(..) | Event::Announced(..)) {
            self.event(event);
        }
    }
}
