//! The driver: takes events to the state machine and performs what it decides.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lockstep_common::checkpoint::{Shown, Standing, State};
use lockstep_common::config::RunSpec;
use lockstep_common::kernel::Precision;
use lockstep_common::ledger::Record;
use lockstep_common::placement::PlacedData;
use lockstep_common::progress::{Event as Progressed, RunState, RunStatus, TimedEvent, Transport, WorkerStatus};
use lockstep_common::protocol::{
    Assignment, FromWorker, LeafTask, MemberId, Refusal, ToWorker, Welcome, Work, WorkerChoice,
};
use lockstep_common::shared_memory::FloatBuffer;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tracing::{debug, error, info, warn};

use crate::aggregate::{FromAggregator, ToAggregator};
use crate::checkpoint::{CheckpointWriter, Draft};
use crate::expected::ExpectedSamples;
use crate::journal::Journal;
use crate::link::{DrainError, Inbound, Link};
use crate::monitor::Hub;
use crate::round::{CheckpointId, ConnectionId, Effect, Event, Machine, Occasion, Outcome, Task, ToMember};
use crate::trouble::Trouble;

/// How often leases and late leaves are looked at: a small part of the time that a leaf may be late.
const TICK: Duration = Duration::from_millis(10);

/// How often the list of members is made anew: every so many ticks.
const SHOWN_TICKS: u32 = 5;

/// What a run leaves behind.
#[derive(Debug)]
pub struct RunResult {
    /// How it ended.
    pub outcome: Outcome,
    /// The parameters after the last committed round.
    pub parameters: Arc<FloatBuffer>,
    /// Rounds committed.
    pub rounds: u64,
    /// The run at its end, as the monitor shows it.
    pub status: RunStatus,
    /// Workers ever admitted.
    pub workers_seen: u32,
    /// Members lost without having drained.
    pub workers_lost: u32,
    /// From the first round's start to the last one's commit, without the time between a stop and a restart.
    pub training_time: Duration,
    /// Rounds after which the newest checkpoint was taken, if there is one.
    pub checkpoint: Option<u64>,
}

/// What the driver works with.
pub(crate) struct Driver {
    pub(crate) spec: RunSpec,
    pub(crate) machine: Machine,
    pub(crate) data: Arc<PlacedData>,
    pub(crate) aggregator: mpsc::Sender<ToAggregator>,
    pub(crate) journal: Journal,
    pub(crate) hub: Arc<Hub>,
    /// What parameters are rounded to when they travel.
    pub(crate) wire: Precision,
    /// The parameters after the last committed round.
    pub(crate) parameters: Arc<FloatBuffer>,
    /// The parameters that a round has made and that become current with its commit.
    pub(crate) made: Option<Arc<FloatBuffer>>,
    pub(crate) expected: ExpectedSamples,
    pub(crate) started: Instant,
    pub(crate) links: BTreeMap<MemberId, Box<dyn Link>>,
    pub(crate) joining: HashMap<ConnectionId, Joining>,
    pub(crate) connections: u64,
    pub(crate) first_round: Option<Instant>,
    pub(crate) last_commit: Option<Instant>,
    /// Time spent training before the coordinator was started again.
    pub(crate) trained_before: Duration,
    pub(crate) checkpoints: CheckpointWriter,
    /// What became of checkpoints.
    pub(crate) settled: mpsc::UnboundedReceiver<Event>,
    /// What is the same in every checkpoint.
    pub(crate) state: State,
    pub(crate) troubles: std::sync::mpsc::Receiver<Trouble>,
    pub(crate) outcome: Option<Outcome>,
}

pub(crate) struct Joining {
    link: Box<dyn Link>,
    answer: oneshot::Sender<Result<Welcome, Refusal>>,
}

impl Driver {
    /// Runs until the machine says that the run has ended.
    pub(crate) async fn run(
        mut self,
        mut inbound: mpsc::Receiver<Inbound>,
        mut reports: mpsc::UnboundedReceiver<FromAggregator>,
        shutdown: impl Future<Output = String>,
    ) -> RunResult {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut shutdown = std::pin::pin!(shutdown);
        let mut ticks = 0;
        let mut told_to_stop = false;
        loop {
            tokio::select! {
                biased;
                reason = &mut shutdown, if !told_to_stop => {
                    told_to_stop = true;
                    self.step(Event::Stop(reason)).await;
                }
                // Before the messages: however many there are, leases expire in time.
                _ = tick.tick() => {
                    self.step(Event::Tick).await;
                    ticks = (ticks + 1) % SHOWN_TICKS;
                    if ticks == 0 {
                        self.show_workers();
                    }
                    self.show_troubles().await;
                }
                Some(settled) = self.settled.recv() => {
                    if matches!(settled, Event::Saved(_)) {
                        self.hub.checkpoint_written();
                    }
                    self.step(settled).await;
                }
                Some(report) = reports.recv() => self.aggregated(report).await,
                Some(message) = inbound.recv() => self.received(message).await,
            }
            if let Some(outcome) = self.outcome.take() {
                return self.finish(outcome);
            }
        }
    }

    async fn received(&mut self, message: Inbound) {
        match message {
            Inbound::Join { request, link, answer } => {
                self.connections += 1;
                let connection = ConnectionId(self.connections);
                self.joining.insert(connection, Joining { link, answer });
                self.step(Event::Join { connection, request }).await;
            }
            Inbound::Closed(member, reason) => self.step(Event::Lost(member, reason)).await,
            Inbound::Stop(reason) => self.step(Event::Stop(reason)).await,
            Inbound::Drain { worker, answer } => {
                let chosen = self.choose(worker);
                if let Ok(member) = &chosen {
                    self.step(Event::Drain(*member)).await;
                }
                // An operator who does not wait for the answer any more needs none.
                let _ = answer.send(chosen);
            }
            Inbound::From(member, message) => match message {
                FromWorker::Heartbeat => self.step(Event::Heartbeat(member)).await,
                FromWorker::Cached { list, shard } => self.step(Event::Cached(member, list, shard)).await,
                FromWorker::Announce(report) => self.step(Event::Announced(member, report)).await,
                FromWorker::Computed { work, node, compute } => {
                    self.step(Event::Computed { member, work, node, compute }).await;
                }
                FromWorker::Compared(report) => self.step(Event::Compared(member, report)).await,
                FromWorker::NodeChunk(chunk) => self.aggregate(ToAggregator::Chunk(member, chunk)).await,
                FromWorker::NodePart { round, node, chunk, gradient, .. } => {
                    self.aggregate(ToAggregator::Part { member, round, node, chunk, gradient }).await;
                }
                FromWorker::Drain => self.step(Event::Drain(member)).await,
                FromWorker::Failed { reason } => self.step(Event::Lost(member, reason)).await,
            },
        }
    }

    /// The member that an operator means.
    fn choose(&self, worker: WorkerChoice) -> Result<MemberId, DrainError> {
        let means = |id: MemberId, name: &str| match &worker {
            WorkerChoice::Member(member) => *member == id,
            WorkerChoice::Name(wanted) => wanted == name,
        };
        let found: Vec<MemberId> =
            self.machine.members().filter(|(id, member)| means(*id, &member.name)).map(|(id, _)| id).collect();
        match (&found[..], worker) {
            ([member], _) => Ok(*member),
            ([_, ..], WorkerChoice::Name(name)) => Err(DrainError::Ambiguous { name, members: found }),
            (_, worker) => Err(DrainError::Unknown(worker)),
        }
    }

    async fn aggregated(&mut self, report: FromAggregator) {
        match report {
            FromAggregator::Arrived { member, round, node } => {
                self.step(Event::Arrived { member, work: Work::Gradient { round }, node }).await;
            }
            FromAggregator::Updated { version, chunk, data } => {
                let receivers: Vec<MemberId> = self.machine.receivers().collect();
                for member in receivers {
                    if self.takes_chunks(member) {
                        let (data, precision) = (data.clone(), self.wire);
                        self.send(member, ToWorker::ParameterChunk { version, chunk, data, precision }).await;
                    }
                }
            }
            FromAggregator::Reduced { round, gradient_norm, digest, parameters, took } => {
                let stepped = parameters.is_some();
                if let Some(parameters) = parameters {
                    self.hand_out(round + 1, &parameters).await;
                    self.made = Some(parameters);
                }
                self.step(Event::Reduced { round, gradient_norm, parameters: digest, stepped, took }).await;
            }
            FromAggregator::Skipped { version, parameters } => {
                self.hand_out(version, &parameters).await;
                self.parameters = parameters;
            }
            FromAggregator::Violation { member, reason } => self.step(Event::Violated(member, reason)).await,
        }
    }

    /// Sends a version to everybody who has not got it chunk by chunk.
    async fn hand_out(&mut self, version: u64, parameters: &Arc<FloatBuffer>) {
        let receivers: Vec<MemberId> = self.machine.receivers().collect();
        for member in receivers {
            if !self.takes_chunks(member) {
                let (values, precision) = (parameters.clone(), self.wire);
                self.send(member, ToWorker::Parameters { version, values, precision }).await;
            }
        }
    }

    /// Takes an event to the machine and performs the effects.
    async fn step(&mut self, event: Event) {
        match self.machine.step(self.started.elapsed(), event) {
            Ok(effects) => {
                for effect in effects {
                    self.perform(effect).await;
                }
            }
            // Late messages of rounds and members that are over are part of normal life.
            Err(rejected) => debug!("rejected: {rejected}"),
        }
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Admit(connection, member) => self.admit(connection, member),
            Effect::Refuse(connection, refusal) => {
                info!("refused a worker: {refusal}");
                if let Some(joining) = self.joining.remove(&connection) {
                    // A worker that does not wait for the answer any more needs none.
                    let _ = joining.answer.send(Err(refusal));
                }
            }
            Effect::Send(member, message) => self.tell(member, message).await,
            Effect::Close(member) => {
                self.links.remove(&member);
            }
            Effect::Begin { round, samples, step } => {
                self.first_round.get_or_insert_with(Instant::now);
                // Who takes part is known: chunks that nobody wants are not copied.
                let chunks = self.links.values().any(|link| link.transport() == Transport::Grpc);
                self.aggregate(ToAggregator::Begin { round, samples, step, chunks }).await;
            }
            Effect::Expect(member, node, loss) => self.aggregate(ToAggregator::Expect(member, node, loss)).await,
            Effect::Hold(member, node, loss) => {
                self.aggregate(ToAggregator::Hold(member)).await;
                self.aggregate(ToAggregator::Expect(member, node, loss)).await;
            }
            Effect::Release(member) => self.aggregate(ToAggregator::Release(member)).await,
            Effect::Discard(member) => self.aggregate(ToAggregator::Discard(member)).await,
            Effect::Skip { round } => self.aggregate(ToAggregator::Skip { round }).await,
            Effect::Record(record) => self.commit(&record),
            Effect::Checkpoint(id, standing, occasion) => self.checkpoint(id, *standing, occasion).await,
            Effect::Publish(event) => self.publish(event),
            Effect::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn commit(&mut self, record: &Record) {
        if let Some(made) = self.made.take() {
            self.parameters = made;
        }
        self.last_commit = Some(Instant::now());
        self.journal.record(record);
    }

    /// Has a checkpoint written of what the machine, the monitor, the ledger and the aggregator have at this moment. The
    /// aggregator takes its snapshot before it hears of another round.
    async fn checkpoint(&mut self, id: CheckpointId, standing: Standing, occasion: Occasion) {
        let RunStatus { loss, train_loss, validation_loss, .. } = self.hub.status();
        let shown = Shown { loss, train_loss, validation_loss, training_time: self.training_time() };
        let state = State { standing, shown, ..self.state.clone() };
        let draft = Draft { id, state, position: self.journal.position(), must: occasion == Occasion::End };
        self.aggregate(ToAggregator::Checkpoint(Box::new(draft))).await;
    }

    async fn show_troubles(&mut self) {
        while let Ok(trouble) = self.troubles.try_recv() {
            match trouble {
                Trouble::Began { about, message } => {
                    self.hub.trouble(about, Some(&message));
                    self.publish(Progressed::Notice { message });
                }
                Trouble::Over { about, message } => {
                    self.hub.trouble(about, None);
                    self.publish(Progressed::Notice { message });
                }
                Trouble::Fatal { message } => self.step(Event::Stop(message)).await,
            }
        }
    }

    fn admit(&mut self, connection: ConnectionId, member: MemberId) {
        let Some(Joining { link, answer }) = self.joining.remove(&connection) else { return };
        let heartbeat_interval = self.spec.heartbeat_interval;
        let welcome = Welcome { member, job: self.spec.job(), heartbeat_interval, shared_memory: None };
        self.links.insert(member, link);
        // If the worker is gone already, its connection reports that by itself.
        let _ = answer.send(Ok(welcome));
    }

    /// Sends what the machine said, with everything that the message refers to.
    async fn tell(&mut self, member: MemberId, message: ToMember) {
        match message {
            ToMember::Keep(shards) => self.send(member, ToWorker::Keep(shards)).await,
            ToMember::Parameters(version) => self.send_parameters(member, version).await,
            ToMember::Assign(work, leaves) => {
                let leaves = leaves.into_iter().map(|Task { leaf, inline, handing }| LeafTask {
                    leaf,
                    inline: inline.then(|| Arc::new(self.data.pack(work.split(), &self.expected.samples(work, leaf)))),
                    handing,
                });
                let leaves = leaves.collect();
                self.send(member, ToWorker::Assign(Assignment { work, leaves })).await;
            }
            ToMember::Evicted(reason) => self.send(member, ToWorker::Evicted { reason }).await,
            ToMember::Finished(reason) => self.send(member, ToWorker::Finished { reason }).await,
        }
    }

    async fn send_parameters(&mut self, member: MemberId, version: u64) {
        let values = self.parameters.clone();
        self.send(member, ToWorker::Parameters { version, values, precision: self.wire }).await;
    }

    /// Whether a member gets new parameters chunk by chunk.
    fn takes_chunks(&self, member: MemberId) -> bool {
        self.links.get(&member).is_some_and(|link| link.transport() == Transport::Grpc)
    }

    async fn send(&mut self, member: MemberId, message: ToWorker) {
        let Some(link) = self.links.get_mut(&member) else { return };
        if let Err(error) = link.send(message) {
            self.links.remove(&member);
            // Not a direct call: performing the loss may send again.
            Box::pin(self.step(Event::Lost(member, error.to_string()))).await;
        }
    }

    async fn aggregate(&mut self, message: ToAggregator) {
        if self.aggregator.send(message).await.is_err() {
            self.outcome = Some(Outcome::Failed("the aggregator thread has ended unexpectedly".to_owned()));
        }
    }

    fn publish(&mut self, event: Progressed) {
        match &event {
            Progressed::Joined { member, name } => info!("{member} joined: {name}"),
            Progressed::Left { member, reason } => info!("{member} left: {reason}"),
            Progressed::State { state: RunState::Waiting { reason } } => info!("waiting: {reason}"),
            Progressed::Notice { message } => warn!("{message}"),
            _ => {}
        }
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let event = TimedEvent { unix_ms, event };
        self.journal.event(&event);
        self.hub.publish(event);
    }

    fn show_workers(&self) {
        let now = self.started.elapsed();
        let workers = self.machine.members().map(|(id, member)| WorkerStatus {
            member: id,
            name: member.name.clone(),
            isa: member.isa.clone(),
            threads: member.threads,
            transport: self.links.get(&id).map_or(Transport::Grpc, |link| link.transport()),
            leaves: self.machine.outstanding(id),
            cached_shards: member.cached.len() as u32,
            leaves_computed: member.leaves_computed,
            last_compute: member.last_compute,
            leaf_time: member.pace.leaf_time().map(Duration::from_secs_f64),
            leaves_hedged: member.leaves_hedged,
            silent_for: now.saturating_sub(member.last_seen),
        });
        self.hub.show_workers(workers.collect());
        self.hub.count_workers(self.machine.workers_seen_and_lost());
    }

    fn finish(self, outcome: Outcome) -> RunResult {
        let (workers_seen, workers_lost) = self.machine.workers_seen_and_lost();
        self.hub.count_workers((workers_seen, workers_lost));
        let training_time = self.training_time();
        // The writer ends when the aggregator does, and needs the journal until then.
        drop(self.aggregator);
        let checkpoint = self.checkpoints.finish();
        self.journal.close();
        // Nobody is shown the rest any more; it must not be lost.
        for trouble in self.troubles.try_iter() {
            match trouble {
                Trouble::Began { message, .. } | Trouble::Fatal { message } => error!("{message}"),
                Trouble::Over { message, .. } => info!("{message}"),
            }
        }
        RunResult {
            outcome,
            parameters: self.parameters,
            rounds: self.machine.rounds(),
            status: self.hub.status(),
            workers_seen,
            workers_lost,
            training_time,
            checkpoint,
        }
    }

    fn training_time(&self) -> Duration {
        let here = match (self.first_round, self.last_commit) {
            (Some(first), Some(last)) => last.saturating_duration_since(first),
            _ => Duration::ZERO,
        };
        self.trained_before + here
    }
}
