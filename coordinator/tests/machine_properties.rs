//! Scenario: any number of workers join, work, stall, die, drain and come back, in any order, and their messages are
//! lost with them, repeated, or come from rounds that are over. The coordinator is killed as well, at any moment, and
//! goes on from its last checkpoint. Some rounds are not finite.
//!
//! Property: the machine never fails, every leaf of every round is credited to a member that was asked for it, each
//! round is committed exactly once and in order, no two members ever have the same number, the losses and the ledger do not depend on the schedule, and the run
//! ends once there are workers to end it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lockstep_common::checkpoint::Standing;
use lockstep_common::config::{DataFacts, NonFiniteAction, NonFiniteConfig, RunConfig, RunSpec};
use lockstep_common::data::Dtype;
use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::hash::Digest;
use lockstep_common::kernel::Compute;
use lockstep_common::ledger::Record;
use lockstep_common::model;
use lockstep_common::progress::{Aggregation, Event as Progressed};
use lockstep_common::protocol::{Finding, JoinRequest, MemberId, NodeReport, Refusal, Work};
use lockstep_common::reduce::{NodeId, Reduction};
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shape::Shape;
use lockstep_common::shard::samples_digest;
use lockstep_coordinator::expected::ExpectedSamples;
use lockstep_coordinator::round::{
    CheckpointId, ConnectionId, Effect, Event, Machine, MachineConfig, Outcome, Rejected, Step, ToMember,
};
use proptest::prelude::*;

fn spec(samples: u32, validation_samples: u32, batch_size: u32, shards: u32, min_workers: u32) -> RunSpec {
    let mut config = RunConfig { name: Some("test".into()), epochs: 2, batch_size, shards, ..RunConfig::default() };
    config.cluster.min_workers = min_workers;
    config.checkpoint.every_rounds = 2;
    // The simulation has them.
    config.cluster.spot_check = 0;
    config.non_finite = NonFiniteConfig { action: NonFiniteAction::LowerRate, ..NonFiniteConfig::default() };
    let data = DataFacts {
        name: "test".into(),
        sample_shape: Shape::new([28, 28]),
        dtype: Dtype::U8,
        training_samples: samples,
        validation_samples,
    };
    config.resolve(model::preset("conv").unwrap(), &data).unwrap()
}

/// Chunks of a gradient in this test.
const CHUNKS: usize = 3;

/// What a member has been told and has not answered.
#[derive(Default)]
struct Worker {
    tasks: Vec<(Work, NodeId)>,
    announced: Vec<Upload>,
    version: Option<u64>,
    silent: bool,
}

/// A node on its way, last chunk first.
#[derive(Clone)]
struct Upload {
    member: MemberId,
    round: u64,
    node: NodeId,
    /// How many chunks are still to come.
    left: usize,
}

/// A world around the machine: what workers would do, under the control of a stream of random numbers.
struct World {
    machine: Machine,
    expected: ExpectedSamples,
    spec: RunSpec,
    now: Duration,
    random: Stream,
    connections: u64,
    processes: u64,
    workers: BTreeMap<MemberId, Worker>,
    joining: BTreeMap<ConnectionId, u64>,
    /// The aggregator: which nodes of the round at hand are there, chunk by chunk.
    sums: Option<(u64, Vec<Reduction<()>>)>,
    /// What lost members had sent, and the aggregator has not taken yet.
    orphans: Vec<Upload>,
    reduced: Option<u64>,
    records: Vec<Record>,
    epochs: Vec<(f64, Option<f64>)>,
    outcome: Option<Outcome>,
    old: Vec<Event>,
    /// The last checkpoint, and how many epochs were closed when it was taken.
    checkpoint: (Standing, usize),
    /// A checkpoint that the machine has not heard of to be on the disk.
    saved: Option<CheckpointId>,
    restarts: u32,
    admitted: BTreeSet<MemberId>,
    /// Rounds in which the loss of a leaf is not finite.
    sick: Sick,
    /// Steps that rounds began with.
    steps: BTreeMap<u64, Step>,
    notices: Vec<String>,
}

/// Round `i` is not finite if bit `i` is set: because of its last leaf but one, or the only one.
#[derive(Clone, Copy)]
struct Sick(u64);

impl Sick {
    fn leaf(self, round: u64, shards: u32) -> Option<u32> {
        (round < 64 && self.0 >> round & 1 == 1).then(|| shards.saturating_sub(2))
    }
}

/// The loss of a node, which depends on nothing but the node. That of a sick leaf is not a number.
fn node_loss(work: Work, node: NodeId, sick: Option<u32>) -> f64 {
    match node.children() {
        None if sick == Some(node.index) && matches!(work, Work::Gradient { .. }) => f64::NAN,
        None => 1.0 / (work.version() as f64 + 3.0) + f64::from(node.index) * 0.1,
        Some([left, right]) => node_loss(work, left, sick) + node_loss(work, right, sick),
    }
}

impl World {
    fn new(spec: RunSpec, seed: u64) -> Self {
        Self::sick(spec, seed, Sick(0))
    }

    fn sick(spec: RunSpec, seed: u64, sick: Sick) -> Self {
        let config = MachineConfig { spec: spec.clone(), version: "1".into(), fingerprint: Digest(1) };
        Self {
            machine: Machine::new(config),
            expected: ExpectedSamples::new(spec.schedule, spec.validation_samples),
            spec,
            now: Duration::ZERO,
            random: Stream::new(seed, Purpose::SelfTest, 0, 0),
            connections: 0,
            processes: 0,
            workers: BTreeMap::new(),
            joining: BTreeMap::new(),
            sums: None,
            orphans: Vec::new(),
            reduced: None,
            records: Vec::new(),
            epochs: Vec::new(),
            outcome: None,
            old: Vec::new(),
            checkpoint: (Standing::default(), 0),
            saved: None,
            restarts: 0,
            admitted: BTreeSet::new(),
            sick,
            steps: BTreeMap::new(),
            notices: Vec::new(),
        }
    }

    /// The coordinator is killed and started again: everything after its last checkpoint is forgotten, and so are all
    /// connections.
    fn restart(&mut self) {
        self.restarts += 1;
        let config = MachineConfig { spec: self.spec.clone(), version: "1".into(), fingerprint: Digest(1) };
        let (standing, epochs) = &self.checkpoint;
        self.machine = Machine::resume(config, standing, self.restarts);
        assert_eq!(self.machine.standing(), *standing);
        self.records.truncate(standing.rounds as usize);
        self.epochs.truncate(*epochs);
        self.workers.clear();
        self.joining.clear();
        (self.sums, self.reduced, self.saved) = (None, None, None);
        self.orphans.clear();
        self.now = Duration::ZERO;
    }

    fn step(&mut self, event: Event) {
        self.old.push(event.clone());
        match self.machine.step(self.now, event) {
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
                self.joining.remove(&connection).expect("a join is answered once");
                assert!(self.admitted.insert(member), "{member} was admitted before");
                self.workers.insert(member, Worker::default());
            }
            Effect::Checkpoint(id, standing, _) => {
                assert_eq!(standing.rounds, self.records.len() as u64, "a checkpoint is taken at an edge");
                self.checkpoint = (*standing, self.epochs.len());
                self.saved = Some(id);
            }
            Effect::Refuse(connection, refusal) => {
                self.joining.remove(&connection).expect("a join is answered once");
                assert!(self.outcome.is_some(), "{refusal}");
            }
            Effect::Send(member, message) => self.deliver(member, message),
            Effect::Close(member) => {
                let worker = self.workers.remove(&member).into_iter();
                self.orphans.extend(worker.flat_map(|worker| worker.announced));
            }
            Effect::Begin { round, samples, step } => {
                let began = *self.steps.entry(round).or_insert(step);
                assert_eq!(began, step, "a round takes the same step when it is begun again");
                assert_eq!(round, self.records.len() as u64, "rounds begin in order");
                assert!(samples > 0);
                self.sums = Some((round, vec![Reduction::new(self.spec.schedule.tree); CHUNKS]));
            }
            Effect::Skip { round } => assert_eq!(round, self.records.len() as u64, "the round at hand is skipped"),
            Effect::Expect(member, node, _) => {
                let (round, _) = self.sums.as_ref().expect("a round was begun");
                let upload = Upload { member, round: *round, node, left: CHUNKS };
                self.workers.get_mut(&member).expect("a member").announced.push(upload);
            }
            Effect::Hold(..) | Effect::Release(_) | Effect::Discard(_) => panic!("nothing is checked"),
            Effect::Record(record) => {
                assert_eq!(record.round, self.records.len() as u64, "each round is committed once, in order");
                self.records.push(record);
            }
            Effect::Publish(Progressed::Epoch(epoch)) => self.epochs.push((epoch.train_loss, epoch.validation_loss)),
            Effect::Publish(Progressed::Notice { message }) => self.notices.push(message),
            Effect::Publish(_) => {}
            Effect::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn deliver(&mut self, member: MemberId, message: ToMember) {
        let Some(worker) = self.workers.get_mut(&member) else { return };
        match message {
            ToMember::Parameters(version) => worker.version = Some(version),
            ToMember::Assign(work, leaves) => {
                assert!(worker.version.is_some(), "{member} has work, but was never sent parameters");
                let leaves: Vec<u32> = leaves.into_iter().map(|task| task.leaf).collect();
                let nodes = self.spec.schedule.tree.cover_set(&leaves);
                worker.tasks.extend(nodes.into_iter().map(|node| (work, node)));
            }
            ToMember::Keep(_) | ToMember::Evicted(_) | ToMember::Finished(_) => {}
        }
    }

    fn report(&mut self, work: Work, node: NodeId) -> NodeReport {
        let mut samples = 0;
        let digests = node.leaves().map(|leaf| {
            let ids = self.expected.samples(work, leaf);
            samples += ids.len() as u32;
            samples_digest(ids)
        });
        let digests = digests.collect();
        let sick = self.sick.leaf(work.version(), self.spec.schedule.tree.shards());
        let found = sick.filter(|leaf| matches!(work, Work::Inspection { .. }) && node.leaves().contains(leaf));
        NodeReport {
            work,
            node,
            loss: node_loss(work, node, sick),
            samples,
            digests,
            // Some announce a gradient before it is whole.
            compute: (!matches!(work, Work::Gradient { .. }) || self.random.below(2) == 0)
                .then_some(Duration::from_millis(1)),
            waited: Duration::ZERO,
            gradient: None,
            finding: found.map(|leaf| Finding { leaf, samples: vec![7], loss: f64::NAN, tensors: Some((0, 1)) }),
        }
    }

    fn join(&mut self) {
        // A new process, or one that was here before, perhaps while its old incarnation is still a member.
        let process = match self.random.below(3) {
            0 if self.processes > 0 => u64::from(self.random.below(self.processes as u32)) + 1,
            _ => {
                self.processes += 1;
                self.processes
            }
        };
        self.connections += 1;
        let connection = ConnectionId(self.connections);
        self.joining.insert(connection, process);
        let request = JoinRequest {
            process,
            name: format!("p{process}"),
            version: "1".into(),
            fingerprints: Fingerprints { f32: Digest(1), ..Fingerprints::default() },
            threads: 1 + self.random.below(3),
            isa: "scalar".into(),
        };
        self.step(Event::Join { connection, request });
    }

    fn pick(&mut self) -> Option<MemberId> {
        let members: Vec<MemberId> = self.workers.keys().copied().collect();
        (!members.is_empty()).then(|| members[self.random.below(members.len() as u32) as usize])
    }

    /// One thing happens.
    fn advance(&mut self, calm: bool) {
        self.now += Duration::from_millis(u64::from(self.random.below(40)));
        let sign_of_life: Vec<MemberId> =
            self.workers.iter().filter(|(_, worker)| !worker.silent).map(|(id, _)| *id).collect();
        sign_of_life.into_iter().for_each(|member| self.step(Event::Heartbeat(member)));
        if let Some(id) = self.saved.take() {
            self.step(Event::Saved(id));
        }
        if let Some(round) = self.reduced.take() {
            let parameters = Digest(u128::from(round) + 100);
            let stepped = self.sick.leaf(round, self.spec.schedule.tree.shards()).is_none();
            let took = Aggregation::default();
            return self.step(Event::Reduced { round, gradient_norm: 1.0, parameters, stepped, took });
        }
        let choice = self.random.below(if calm { 60 } else { 100 });
        match choice {
            0..50 => self.work(),
            50..55 => self.step(Event::Tick),
            55..60 if self.workers.len() < 3 => self.join(),
            60..70 if self.workers.len() < 9 => self.join(),
            70..75 => {
                if let Some(member) = self.pick() {
                    self.step(Event::Lost(member, "killed".into()));
                }
            }
            75..78 => {
                if let Some(member) = self.pick() {
                    self.step(Event::Drain(member));
                }
            }
            78..81 => {
                if let Some(member) = self.pick() {
                    self.workers.get_mut(&member).unwrap().silent = true;
                }
            }
            81..83 => self.now += self.spec.lease_timeout / 2,
            83..84 => self.restart(),
            84..95 => {
                // A message from the past comes again.
                let at = self.random.below(self.old.len().max(1) as u32) as usize;
                match self.old.get(at).cloned() {
                    Some(Event::Join { .. } | Event::Lost(..) | Event::Stop(_) | Event::Drain(_)) | None => {}
                    Some(event @ Event::Reduced { round, .. }) => {
                        if (round as usize) < self.records.len() {
                            self.step(event);
                        }
                    }
                    // The aggregator reports an arrival only once, for the round at hand.
                    Some(Event::Arrived { work, .. })
                        if self.sums.as_ref().is_some_and(|(r, _)| work.version() == *r) => {}
                    Some(event) => self.step(event),
                }
            }
            _ => {}
        }
    }

    /// A member takes a step of its work.
    fn work(&mut self) {
        // What a lost member had sent is taken some time, or was lost with it.
        if !self.orphans.is_empty() && self.random.below(4) == 0 {
            let at = self.random.below(self.orphans.len() as u32) as usize;
            let upload = self.orphans.swap_remove(at);
            return match self.random.below(4) {
                0 => {}
                _ => self.deliver_chunk(upload).into_iter().for_each(|rest| self.orphans.push(rest)),
            };
        }
        let Some(member) = self.pick() else { return };
        let worker = self.workers.get_mut(&member).unwrap();
        if let Some(upload) = worker.announced.pop() {
            let rest = self.deliver_chunk(upload);
            if let Some(worker) = self.workers.get_mut(&member) {
                worker.announced.extend(rest);
            }
        } else if let Some((work, node)) = worker.tasks.pop() {
            let report = self.report(work, node);
            self.step(Event::Announced(member, report));
        }
    }

    /// The aggregator takes a chunk of a node. Gives what is left of the node.
    fn deliver_chunk(&mut self, mut upload: Upload) -> Option<Upload> {
        let (round, sums) = self.sums.as_mut().filter(|(round, _)| *round == upload.round)?;
        upload.left -= 1;
        let before = sums.iter().all(|sum| sum.root().is_some());
        sums[upload.left].insert(upload.node, (), |(), ()| ());
        let complete = !before && sums.iter().all(|sum| sum.root().is_some());
        let round = *round;
        if upload.left == 0 {
            let Upload { member, node, .. } = upload;
            let work = Work::Gradient { round };
            self.step(Event::Computed { member, work, node, compute: Duration::from_millis(2) });
            self.step(Event::Arrived { member, work, node });
        }
        if complete {
            self.reduced = Some(round);
        }
        (upload.left > 0).then_some(upload)
    }

    fn run(mut self) -> Self {
        for _ in 0..400 {
            self.advance(false);
            if self.outcome.is_some() {
                return self;
            }
        }
        // The storm is over: silent workers expire, new ones join, and the run must end.
        for _ in 0..60_000 {
            self.advance(true);
            if self.outcome.is_some() {
                return self;
            }
        }
        panic!("the run stands still after {} rounds", self.records.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn every_schedule_ends_with_the_same_record(
        samples in 40u32..90, validation in prop_oneof![Just(0u32), 5u32..40], levels in 0u32..5,
        min_workers in 1u32..3, sick in any::<u8>(), seed in any::<u64>()
    ) {
        let shards = 1 << levels;
        let spec = spec(samples, validation, 16.max(shards), shards, min_workers.min(shards));
        // No more in a row than the run allows, and no last one that would be skipped unseen.
        let sick = Sick(u64::from(sick) << 1);
        let world = World::sick(spec.clone(), seed, sick).run();
        prop_assert_eq!(world.outcome, Some(Outcome::Completed));
        prop_assert_eq!(world.records.len() as u64, spec.total_rounds());
        let tree = spec.schedule.tree;
        let mut expected = ExpectedSamples::new(spec.schedule, validation);
        for record in &world.records {
            let work = Work::Gradient { round: record.round };
            let is_sick = sick.leaf(record.round, shards).is_some();
            prop_assert_eq!(record.skipped, is_sick, "round {}", record.round);
            let loss = node_loss(work, tree.root(), sick.leaf(record.round, shards)) / f64::from(record.samples);
            prop_assert!(record.loss == loss || is_sick && record.loss.is_nan(), "round {}", record.round);
            let skipped = (0..record.round).filter(|&round| sick.leaf(round, shards).is_some()).count() as u64;
            let step = Step { number: record.round + 1 - skipped, learning_rate: 0.001 * 0.5f64.powi(skipped as i32) };
            prop_assert_eq!(world.steps[&record.round], step);
            let covered: Vec<u32> = record.nodes.iter().flat_map(|part| part.node.leaves()).collect();
            prop_assert_eq!(covered, (0..shards).collect::<Vec<u32>>());
            let digests: Vec<Digest> = (0..shards).map(|leaf| samples_digest(expected.samples(work, leaf))).collect();
            prop_assert_eq!(&record.leaves, &digests);
        }
        prop_assert_eq!(world.epochs.len(), 2);
        prop_assert!(world.epochs.iter().all(|(_, loss)| loss.is_some() == (validation > 0)));
        let skipped = world.records.iter().filter(|record| record.skipped).count();
        prop_assert_eq!(world.checkpoint.0.skipped.rounds, skipped as u64);
        prop_assert_eq!(world.checkpoint.0.rounds, spec.total_rounds(), "the last checkpoint is of the end");
    }
}

/// Lets one worker work until `rounds` rounds are done.
fn calm_world(rounds: u64) -> World {
    let mut world = World::new(spec(64, 0, 16, 4, 1), 1);
    world.join();
    while world.machine.rounds() < rounds {
        world.advance(true);
    }
    world
}

#[test]
fn a_run_that_is_told_to_stop_completes_its_round_and_writes_a_checkpoint() {
    let mut world = calm_world(1);
    world.step(Event::Stop("enough".into()));
    assert_eq!(world.outcome, None, "round 1 is under way");
    while world.outcome.is_none() {
        world.advance(true);
    }
    assert_eq!(world.outcome, Some(Outcome::Stopped("enough".into())));
    assert_eq!((world.records.len(), world.checkpoint.0.rounds), (2, 2));
}

#[test]
fn a_round_that_nobody_completes_does_not_hold_up_a_stop() {
    let mut world = calm_world(1);
    world.step(Event::Stop("enough".into()));
    world.now += Duration::from_secs(6);
    world.step(Event::Tick);
    assert_eq!(world.outcome, None, "the last checkpoint is not on the disk");
    world.advance(true);
    assert_eq!(world.outcome, Some(Outcome::Stopped("enough".into())));
    assert_eq!(world.checkpoint.0.rounds, 1);

    let mut world = calm_world(1);
    let member = world.pick().unwrap();
    world.step(Event::Stop("enough".into()));
    world.step(Event::Lost(member, "gone".into()));
    world.step(Event::Tick);
    world.advance(true);
    assert_eq!(world.outcome, Some(Outcome::Stopped("enough".into())), "there is nobody to wait for");
}

/// Scenario: the last checkpoint never gets to the disk. Property: people are told what the end waits for; members are kept
/// for a minute, and then dismissed, with a notice.
#[test]
fn a_disk_that_hangs_does_not_hold_up_the_end_for_ever() {
    let mut world = calm_world(1);
    world.step(Event::Stop("enough".into()));
    world.now += Duration::from_secs(6);
    let mut step = |seconds: u64| {
        world.now += Duration::from_secs(seconds);
        world.step(Event::Heartbeat(*world.workers.keys().next().expect("a member is kept")));
        world.machine.step(world.now, Event::Tick).unwrap()
    };
    assert!(matches!(step(0)[..], [Effect::Checkpoint(..)]));
    let told = step(2);
    assert!(format!("{told:?}").contains("the run ends when its last checkpoint, after round 1, is on the disk"));
    (0..57).for_each(|_| assert_eq!(step(1), []));
    let dismissed = step(1);
    assert!(format!("{:?}", dismissed[0]).contains("after round 1, is not on the disk after 60 s"), "{dismissed:?}");
    assert_eq!(dismissed.last(), Some(&Effect::Finish(Outcome::Stopped("enough".into()))));
}

/// A run whose round 2 is not finite, until it ends.
fn sick_run(config: NonFiniteConfig, sick: Sick) -> World {
    let mut spec = spec(64, 0, 16, 4, 1);
    spec.non_finite = config;
    let mut world = World::sick(spec, 1, sick);
    world.join();
    while world.outcome.is_none() {
        world.advance(true);
    }
    world
}

#[test]
fn a_round_that_is_not_finite_stops_the_run_before_it_and_is_described() {
    let world = sick_run(NonFiniteConfig::default(), Sick(1 << 2));
    let Some(Outcome::Failed(reason)) = &world.outcome else { panic!("{:?}", world.outcome) };
    for expected in [
        "round 2 is not finite: its loss is NaN, its gradient's norm 1",
        "it begins in leaf 2 (computed by w",
        "), sample 7: the loss is NaN",
        "the gradient is not finite from encoder.0.conv2d.kernel to encoder.0.conv2d.bias",
        "non_finite.action skip or lower_rate",
    ] {
        assert!(reason.contains(expected), "{expected:?} is not in {reason}");
    }
    assert_eq!((world.records.len(), world.checkpoint.0.rounds), (2, 2), "the checkpoint is of the version before");
}

#[test]
fn too_many_skipped_rounds_in_a_row_stop_the_run() {
    let config = NonFiniteConfig { action: NonFiniteAction::Skip, max_in_a_row: 2, ..NonFiniteConfig::default() };
    let world = sick_run(config, Sick(0b1011_0110));
    let Some(Outcome::Completed) = &world.outcome else { panic!("{:?}", world.outcome) };
    assert!(world.steps.values().all(|step| step.learning_rate == 0.001));
    assert!(world.notices[0].contains("round 1 is not finite") && world.notices[0].ends_with("; its batch is skipped"));
    let world = sick_run(config, Sick(0b1110));
    let Some(Outcome::Failed(reason)) = &world.outcome else { panic!("{:?}", world.outcome) };
    assert!(reason.contains("after 2 skipped rounds in a row"), "{reason}");
    assert_eq!((world.records.len(), world.checkpoint.0.rounds), (3, 3));
}

#[test]
fn a_stop_during_an_inspection_leaves_the_round_to_be_done_again() {
    let mut spec = spec(64, 0, 16, 4, 1);
    spec.non_finite.action = NonFiniteAction::Skip;
    let mut world = World::sick(spec, 1, Sick(1 << 2));
    world.join();
    while !world
        .workers
        .values()
        .any(|worker| worker.tasks.iter().any(|(work, _)| matches!(work, Work::Inspection { .. })))
    {
        world.advance(true);
    }
    world.step(Event::Stop("enough".into()));
    assert_eq!(world.outcome, Some(Outcome::Stopped("enough".into())));
    assert_eq!((world.records.len(), world.checkpoint.0.rounds), (2, 2));
}

/// Scenario: a worker joins a run in bfloat16. Property: its fingerprint in that precision counts, and no other.
#[test]
fn a_run_in_bfloat16_compares_fingerprints_in_bfloat16() {
    let refused = |compute, fingerprints| {
        let mut spec = spec(64, 0, 16, 4, 1);
        spec.precision.compute = compute;
        let config = MachineConfig { spec, version: "1".into(), fingerprint: Digest(1) };
        let request = JoinRequest {
            process: 7,
            name: "x".into(),
            version: "1".into(),
            fingerprints,
            threads: 1,
            isa: "scalar".into(),
        };
        let event = Event::Join { connection: ConnectionId(1), request };
        let effects = Machine::new(config).step(Duration::ZERO, event).unwrap();
        effects.iter().any(|effect| matches!(effect, Effect::Refuse(_, Refusal::Fingerprint { .. })))
    };
    let [right, wrong] = [1, 2].map(Digest);
    assert!(refused(Compute::Bf16, Fingerprints { f32: right, bf16: wrong, bf16_amx: right }));
    assert!(!refused(Compute::Bf16, Fingerprints { f32: wrong, bf16: right, bf16_amx: wrong }));
    assert!(refused(Compute::Bf16Amx, Fingerprints { f32: right, bf16: right, bf16_amx: wrong }));
    assert!(!refused(Compute::Bf16Amx, Fingerprints { f32: wrong, bf16: wrong, bf16_amx: right }));
}

#[test]
fn wrong_versions_fingerprints_and_samples_are_refused_or_evicted() {
    let spec = spec(64, 0, 16, 4, 1);
    let mut world = World::new(spec, 1);
    let join = |version: &str, f32| JoinRequest {
        process: 7,
        name: "x".into(),
        version: version.into(),
        fingerprints: Fingerprints { f32, ..Fingerprints::default() },
        threads: 1,
        isa: "scalar".into(),
    };
    let mut answer = |request| {
        let event = Event::Join { connection: ConnectionId(1), request };
        world.machine.step(Duration::ZERO, event).unwrap()
    };
    let text = |effects: &[Effect]| match &effects[0] {
        Effect::Refuse(_, refusal) => refusal.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(text(&answer(join("2", Digest(1)))).contains("version mismatch: the run's coordinator is lockstep 1"));
    assert!(text(&answer(join("1", Digest(2)))).contains("numerics fingerprint mismatch"));
    world.join();
    let member = *world.workers.keys().next().unwrap();
    let (work, node) = world.workers[&member].tasks[0];
    let mut report = world.report(work, node);
    report.digests[1] = Digest(5);
    let effects = world.machine.step(Duration::ZERO, Event::Announced(member, report)).unwrap();
    let evicted = effects.iter().any(|effect| {
        matches!(effect, Effect::Send(_, ToMember::Evicted(reason)) if reason.contains("leaf 1 was computed from other samples"))
    });
    assert!(evicted, "{effects:?}");
}

#[test]
fn a_full_run_lets_in_nobody_but_those_that_come_back() {
    let mut spec = spec(64, 0, 16, 4, 1);
    spec.max_workers = 2;
    let mut world = World::new(spec, 1);
    let mut join = |process| {
        let request = JoinRequest {
            process,
            name: format!("p{process}"),
            version: "1".into(),
            fingerprints: Fingerprints { f32: Digest(1), ..Fingerprints::default() },
            threads: 1,
            isa: "scalar".into(),
        };
        let event = Event::Join { connection: ConnectionId(process), request };
        world.machine.step(Duration::ZERO, event).unwrap().swap_remove(0)
    };
    let admitted = |effect: &Effect| matches!(effect, Effect::Admit(..));
    assert!(admitted(&join(1)) && admitted(&join(2)));
    let refused = join(3);
    let Effect::Refuse(_, refusal) = &refused else { panic!("{refused:?}") };
    assert!(refusal.to_string().contains("has 2 workers already"), "{refusal}");
    assert!(admitted(&join(2)), "it takes the place of its earlier incarnation");
}

/// Scenario: of two members, one announces the node of its two leaves before their gradient is whole, and is so late with
/// that that the other one computes them too and ends the round. Property: what is known of its speed is the time that went
/// by without a gradient, as if it had announced nothing; had it said that the gradient is computed, that is for two leaves.
#[test]
fn an_announcement_before_the_end_tells_no_speed() {
    const LATE: Duration = Duration::from_millis(500);
    let leaf_time = |announces: bool, computes: bool| {
        let mut world = World::new(spec(64, 0, 16, 4, 2), 1);
        while world.workers.len() < 2 {
            world.join();
        }
        let of_two = |(_, worker): &(&MemberId, &Worker)| worker.tasks[0].1.leaves().len() == 2;
        let (&slow, worker) = world.workers.iter().find(of_two).expect("four leaves of two members");
        let (work, node) = worker.tasks[0];
        let quick = *world.workers.keys().find(|id| **id != slow).expect("two members");
        if announces {
            let report = NodeReport { compute: None, ..world.report(work, node) };
            world.step(Event::Announced(slow, report));
        }
        if computes {
            world.step(Event::Computed { member: slow, work, node, compute: Duration::from_millis(3) });
        }
        for time in [Duration::from_millis(10), LATE] {
            world.now = time;
            world.step(Event::Tick);
            while let Some((work, node)) = world.workers.get_mut(&quick).and_then(|worker| worker.tasks.pop()) {
                let report = world.report(work, node);
                world.step(Event::Announced(quick, report));
                world.step(Event::Arrived { member: quick, work, node });
            }
        }
        let (round, parameters, took) = (0, Digest(100), Aggregation::default());
        world.step(Event::Reduced { round, gradient_norm: 1.0, parameters, stepped: true, took });
        assert_eq!(world.records.len(), 1, "the round is over");
        let (_, member) = world.machine.members().find(|(id, _)| *id == slow).expect("it is still there");
        member.pace.leaf_time()
    };
    let late = LATE.as_secs_f64();
    assert_eq!(leaf_time(false, false), Some(late));
    assert_eq!(leaf_time(true, false), Some(late));
    assert_eq!(leaf_time(true, true), Some(late / 2.0));
}

/// Scenario: a member has delivered all of a round, and the run waits for another one. Then an announcement of that round
/// comes, whose gradient was not whole, and nothing for a long time. Property: the member owes nothing, and stays.
#[test]
fn a_late_announcement_of_what_is_not_computed_makes_no_debt() {
    let mut world = World::new(spec(64, 0, 16, 4, 2), 1);
    while world.workers.len() < 2 {
        world.join();
    }
    let members: Vec<MemberId> = world.workers.keys().copied().collect();
    let [stays, leaves] = members[..] else { panic!("{members:?}") };
    world.step(Event::Lost(leaves, "killed".into()));
    let mut report = None;
    while let Some((work, node)) = world.workers.get_mut(&stays).and_then(|worker| worker.tasks.pop()) {
        let of_node = report.insert(world.report(work, node)).clone();
        world.step(Event::Announced(stays, of_node));
        world.step(Event::Arrived { member: stays, work, node });
    }
    let (round, parameters, took) = (0, Digest(100), Aggregation::default());
    world.step(Event::Reduced { round, gradient_norm: 1.0, parameters, stepped: true, took });
    assert_eq!(world.records.len(), 1, "the round is over");
    let report = NodeReport { compute: None, ..report.expect("it had work") };
    world.step(Event::Announced(stays, report));
    for _ in 0..100 {
        world.now += world.spec.lease_timeout / 2;
        world.step(Event::Heartbeat(stays));
        world.step(Event::Tick);
    }
    assert!(world.now > world.spec.work_timeout, "long enough");
    assert_eq!(world.machine.members().map(|(id, _)| id).collect::<Vec<_>>(), [stays]);
}
