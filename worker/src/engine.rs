//! The compute engine: parameters and assignments go in, sums of tree nodes come out.
//!
//! An engine is a plain object that computes when it is told something; [`spawn`] gives it a thread of its own.

mod message;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_common::hash::Digest;
use lockstep_common::kernel::{AlignedFloats, Arithmetic, Isa, Precision, bf16};
use lockstep_common::model::{Layout, LayoutHash, ModelError};
use lockstep_common::nn::{Buffers, LeafSource, Network, NodeSum, Told, Weights, evaluate, subtree, subtree_in_parts};
use lockstep_common::placement::ShardSamples;
use lockstep_common::protocol::{Assignment, CHUNK_FLOATS, Handing, Job, LeafTask, NodeReport, ShardRef, Work, chunks};
use lockstep_common::reduce::NodeId;
use lockstep_common::shared_memory::FloatBuffer;
use lockstep_proto::chunk::copy_into;
use rayon::prelude::*;
use tokio::sync::mpsc;

use crate::shard_cache::ShardCache;
use crate::source::{LeafSamples, Source};
pub use message::{Command, Handover, NewestWork, Output};

/// Versions of the parameters that are kept: the current one, from which lost leaves may have to be computed again, and
/// the one being made.
const KEPT_VERSIONS: usize = 2;

/// Computed nodes, or parts of them, that may wait to be sent.
const OUTPUT_DEPTH: usize = 16;

/// Why a worker cannot take part in a run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The coordinator's model does not resolve here.
    #[error("the run's model cannot be built: {0}")]
    Model(#[from] ModelError),
    /// The two would mean different things by a parameter's index.
    #[error("layout hash mismatch: the run has {run}, this worker {worker}; use the same release")]
    Layout {
        /// The coordinator's.
        run: LayoutHash,
        /// Ours.
        worker: LayoutHash,
    },
    /// There is no memory or right for another thread.
    #[error("cannot start compute threads: {0}")]
    Threads(String),
}

/// See the module's documentation.
pub struct Engine {
    job: Job,
    network: Network,
    layout: Layout,
    threads: usize,
    /// Made by the first assignment, on the thread that computes: that one is among its threads, and is not put to sleep
    /// and woken for each piece of work.
    pool: Option<rayon::ThreadPool>,
    cache: ShardCache,
    /// Whether gradients are handed over in parts, where they can be computed so.
    sends_ahead: bool,
    buffers: Buffers,
    /// Whole versions of the parameters, the newest last.
    versions: VecDeque<(u64, Arc<FloatBuffer>)>,
    /// Versions of which some chunks are there.
    partial: BTreeMap<u64, Partial>,
    /// Memory of versions that came in chunks and are no longer needed.
    spare: Vec<FloatBuffer>,
    packed: AlignedFloats,
    packed_version: Option<u64>,
    /// Assignments whose parameters are not there yet, each with the time at which it came.
    waiting: VecDeque<(Instant, Assignment)>,
    orders: EpochOrders,
    newest: NewestWork,
}

struct Partial {
    values: FloatBuffer,
    there: Vec<bool>,
}

/// The orders in which shards are visited in the epoch at hand.
#[derive(Default)]
struct EpochOrders {
    epoch: u32,
    orders: BTreeMap<u32, Arc<Vec<u32>>>,
}

impl Engine {
    /// An engine for a run.
    ///
    /// # Errors
    /// [`EngineError`] when the run's model cannot be built or has another layout here.
    pub fn new(
        job: Job,
        isa: Isa,
        threads: usize,
        cache: ShardCache,
        handover: Handover,
        newest: NewestWork,
    ) -> Result<Self, EngineError> {
        let model = job.model.resolve()?;
        let worker = model.layout.hash();
        if worker != job.layout {
            return Err(EngineError::Layout { run: job.layout, worker });
        }
        let network = Network::new(&model, job.loss, Arithmetic { isa, compute: job.compute }).with_nodes(job.wire);
        let sends_ahead = matches!(handover, Handover::Sent) && network.parameters() > CHUNK_FLOATS;
        let region = match handover {
            Handover::Shared(region) => Some(region),
            Handover::InProcess | Handover::Sent => None,
        };
        Ok(Self {
            packed: AlignedFloats::zeros(network.packed_len()),
            packed_version: None,
            job,
            network,
            layout: model.layout,
            threads,
            pool: None,
            cache,
            sends_ahead,
            buffers: Buffers::sharing(region),
            spare: Vec::new(),
            versions: VecDeque::new(),
            partial: BTreeMap::new(),
            waiting: VecDeque::new(),
            orders: EpochOrders::default(),
            newest,
        })
    }

    /// Takes a command and computes what can be computed now. `emit` may be called from several threads.
    pub fn handle(&mut self, command: Command, emit: &(dyn Fn(Output) + Sync)) {
        match command {
            Command::Chunk { version, chunk, data, precision } => {
                if let Err(reason) = self.chunk(version, chunk, &data, precision) {
                    return emit(Output::Failed(reason));
                }
            }
            Command::Whole { version, values } => {
                let values = self.rounded(values);
                self.whole(version, values);
            }
            Command::Assign(assignment) => self.waiting.push_back((Instant::now(), assignment)),
            Command::Recycle(gradient) => return self.buffers.recycle(gradient),
        }
        while let Some((came, assignment)) = self.waiting.pop_front() {
            if self.newest.is_after(assignment.work) {
                continue;
            }
            let version = assignment.work.version();
            match self.versions.iter().find(|(whole, _)| *whole == version) {
                Some((_, parameters)) => {
                    let parameters = parameters.clone();
                    self.compute(&assignment, came.elapsed(), &parameters, emit);
                }
                // Work from before the oldest version is over; work from the next one waits for its parameters.
                None if self.versions.front().is_some_and(|(oldest, _)| version < *oldest) => {}
                None => return self.waiting.push_front((came, assignment)),
            }
        }
    }

    fn chunk(&mut self, version: u64, chunk: u32, data: &[u8], precision: Precision) -> Result<(), String> {
        if self.versions.back().is_some_and(|(newest, _)| version <= *newest) {
            return Ok(());
        }
        let len = self.network.parameters();
        let count = len.div_ceil(CHUNK_FLOATS);
        let Some((_, range)) = chunks(len).nth(chunk as usize) else {
            return Err(format!("parameter chunk {chunk} does not exist, there are {count}"));
        };
        let spare = &mut self.spare;
        let fresh =
            || Partial { values: spare.pop().unwrap_or_else(|| FloatBuffer::zeros(len)), there: vec![false; count] };
        let partial = self.partial.entry(version).or_insert_with(fresh);
        copy_into(data, precision, &mut partial.values[range])
            .map_err(|error| format!("parameter chunk {chunk}: {error}"))?;
        partial.there[chunk as usize] = true;
        if partial.there.iter().all(|&there| there)
            && let Some(partial) = self.partial.remove(&version)
        {
            self.whole(version, Arc::new(partial.values));
        }
        Ok(())
    }

    /// The parameters to compute with, of a version that did not travel: what travels is rounded.
    fn rounded(&mut self, values: Arc<FloatBuffer>) -> Arc<FloatBuffer> {
        if self.job.wire == Precision::F32 {
            return values;
        }
        let mut rounded = self.spare.pop().unwrap_or_else(|| FloatBuffer::zeros(values.len()));
        bf16::round_into(self.network.isa(), &values, &mut rounded);
        Arc::new(rounded)
    }

    fn whole(&mut self, version: u64, values: Arc<FloatBuffer>) {
        if self.versions.back().is_some_and(|(newest, _)| version <= *newest) {
            return;
        }
        self.versions.push_back((version, values));
        if self.versions.len() > KEPT_VERSIONS
            && let Some((_, old)) = self.versions.pop_front()
            && let Some(values) = Arc::into_inner(old)
            && values.slot().is_none()
        {
            self.spare.push(values);
        }
        self.partial = self.partial.split_off(&(version + 1));
    }

    fn compute(
        &mut self,
        assignment: &Assignment,
        waited: Duration,
        parameters: &[f32],
        emit: &(dyn Fn(Output) + Sync),
    ) {
        let started = Instant::now();
        let work = assignment.work;
        let source = match self.source(assignment) {
            Ok(source) => source,
            // Its samples may have gone since, with the next keep list.
            Err(_) if self.newest.is_after(work) => return,
            Err(reason) => return emit(Output::Failed(reason)),
        };
        if self.pool.is_none() {
            match compute_pool(self.threads) {
                Ok(pool) => self.pool = Some(pool),
                Err(error) => return emit(Output::Failed(format!("cannot start compute threads: {error}"))),
            }
        }
        let Some(pool) = &self.pool else { return };
        if self.packed_version != Some(work.version()) {
            let (network, packed) = (&self.network, &mut self.packed);
            pool.install(|| network.pack(parameters, packed));
            self.packed_version = Some(work.version());
        }
        let weights = Weights { parameters, packed: &self.packed };
        // Leaves that are compared with others' come by themselves.
        let (alone, summed): (Vec<u32>, Vec<u32>) =
            source.leaves.keys().partition(|leaf| source.asks_for_digest(NodeId::leaf(**leaf)));
        let mut nodes = self.job.schedule.tree.cover_set(&summed);
        nodes.extend(alone.into_iter().map(NodeId::leaf));
        let (network, buffers, layout) = (&self.network, &self.buffers, &self.layout);
        let report = |node: NodeId, loss, samples| NodeReport {
            work,
            node,
            loss,
            samples,
            digests: node.leaves().map(|leaf| source.leaves[&leaf].digest()).collect(),
            compute: None,
            waited,
            gradient: None,
            finding: None,
        };
        let in_parts = |node: NodeId| {
            let tell = &mut |told| match told {
                Told::Part { gradient, .. } if source.newest.is_after(work) => buffers.recycle(gradient),
                Told::Loss { .. } if source.newest.is_after(work) => {}
                Told::Loss { loss, samples } => {
                    emit(Output::Node { report: report(node, loss, samples), gradient: None });
                }
                Told::Part { start, gradient } => {
                    let chunk = (start / CHUNK_FLOATS) as u32;
                    let compute = (start == 0).then(|| started.elapsed());
                    emit(Output::Part { work, node, chunk, gradient, compute });
                }
            };
            subtree_in_parts(network, weights, node, &source, buffers, CHUNK_FLOATS, tell)
        };
        let sends_ahead = self.sends_ahead && matches!(work, Work::Gradient { .. });
        pool.install(|| {
            nodes.into_par_iter().for_each(|node| {
                if sends_ahead && !source.asks_for_digest(node) && in_parts(node) {
                    return;
                }
                let mut finding = None;
                let sum = match work {
                    Work::Gradient { .. } => subtree(network, weights, node, &source, buffers),
                    Work::Evaluation { .. } => evaluate(network, weights, node, &source, buffers),
                    Work::Inspection { .. } => {
                        finding = source.inspect(network, weights, layout, node, buffers);
                        let samples = node.leaves().map(|leaf| source.samples(leaf)).sum();
                        NodeSum { gradient: FloatBuffer::default(), loss: 0.0, samples }
                    }
                };
                if source.newest.is_after(work) {
                    return buffers.recycle(sum.gradient);
                }
                let NodeSum { gradient, loss, samples } = sum;
                let digest = source.asks_for_digest(node).then(|| comparable_digest(&gradient));
                let compute = Some(started.elapsed());
                let report = NodeReport { compute, gradient: digest, finding, ..report(node, loss, samples) };
                if source.compares(node) {
                    buffers.recycle(gradient);
                    return emit(Output::Compared(report));
                }
                emit(Output::Node { report, gradient: (!gradient.is_empty()).then_some(gradient) });
            });
        });
    }

    /// The samples of an assignment's leaves.
    fn source(&mut self, assignment: &Assignment) -> Result<Source, String> {
        let (mut leaves, mut handings) = (BTreeMap::new(), BTreeMap::new());
        for LeafTask { leaf, inline, handing } in &assignment.leaves {
            if !self.job.schedule.tree.contains(NodeId::leaf(*leaf)) {
                return Err(format!("leaf {leaf} does not exist in a tree of {}", self.job.schedule.tree.shards()));
            }
            let samples = match inline {
                Some(samples) => {
                    let samples = ShardSamples::received(&self.job, (**samples).clone());
                    let samples = samples.map_err(|error| format!("samples of leaf {leaf}: {error}"))?;
                    let all = 0..samples.len() as u32;
                    LeafSamples { samples: Arc::new(samples), order: Arc::new(all.clone().collect()), places: all }
                }
                None => self.cached(assignment.work, *leaf)?,
            };
            leaves.insert(*leaf, samples);
            if *handing != Handing::Summed {
                handings.insert(*leaf, *handing);
            }
        }
        Ok(Source { leaves, handings, work: assignment.work, newest: self.newest.clone() })
    }

    fn cached(&mut self, work: Work, leaf: u32) -> Result<LeafSamples, String> {
        let shard = ShardRef { split: work.split(), shard: leaf };
        let samples = self.cache.get(shard).ok_or_else(|| format!("{shard} is not cached, and no samples came"))?;
        let schedule = &self.job.schedule;
        let (order, places) = match work {
            Work::Evaluation { .. } => (Arc::new((0..samples.len() as u32).collect()), 0..samples.len() as u32),
            Work::Gradient { round } | Work::Inspection { round } => {
                let step = schedule.step(round);
                if self.orders.epoch != step.epoch {
                    self.orders = EpochOrders { epoch: step.epoch, orders: BTreeMap::new() };
                }
                let make = || Arc::new(schedule.epoch_order(step.epoch, leaf));
                let order = self.orders.orders.entry(leaf).or_insert_with(make).clone();
                (order, schedule.leaf_places(step.batch, leaf))
            }
        };
        if order.len() != samples.len() {
            return Err(format!("{shard} has {} samples here, {} by the schedule", samples.len(), order.len()));
        }
        Ok(LeafSamples { samples, order, places })
    }
}

/// The digest that workers compare. What a NaN looks like is up to the instruction set, and is nobody's mistake.
fn comparable_digest(gradient: &[f32]) -> Digest {
    if !gradient.iter().any(|value| value.is_nan()) {
        return Digest::of_floats(gradient);
    }
    Digest::of_floats(
        &gradient.iter().map(|value| if value.is_nan() { f32::NAN } else { *value }).collect::<Vec<f32>>(),
    )
}

/// Threads to compute with, this one among them. A thread belongs to one pool for good: the second engine on a thread,
/// which only tests have, gets as many other threads.
fn compute_pool(threads: usize) -> Result<rayon::ThreadPool, rayon::ThreadPoolBuildError> {
    let builder = || rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute-{i}"));
    builder().use_current_thread().build().or_else(|_| builder().build())
}

/// Runs an engine on a thread of its own, until the commands' sender is gone.
///
/// # Errors
/// [`EngineError::Threads`] when the thread cannot be started.
pub fn spawn(mut engine: Engine) -> Result<(mpsc::UnboundedSender<Command>, mpsc::Receiver<Output>), EngineError> {
    // Commands are bounded by the protocol: one version and one assignment per piece of work.
    let (commands, mut inbox) = mpsc::unbounded_channel();
    let (outputs, outbox) = mpsc::channel(OUTPUT_DEPTH);
    let run = move || {
        while let Some(command) = inbox.blocking_recv() {
            // A closed channel means that the session is over; the commands' end follows.
            engine.handle(command, &|output| drop(outputs.blocking_send(output)));
        }
    };
    let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run);
    thread.map_err(|error| EngineError::Threads(error.to_string()))?;
    Ok((commands, outbox))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::example;

    /// Scenario: an assignment is taken up, and its samples are not cached. Property: that is an error, unless the work was
    /// over before they went.
    #[test]
    fn samples_that_are_gone_matter_only_while_their_work_goes_on() {
        let (job, newest) = (example::spec().job(), NewestWork::default());
        let engine = Engine::new(job, Isa::SCALAR, 1, ShardCache::default(), Handover::InProcess, newest.clone());
        let mut engine = engine.expect("a known model");
        let work = Work::Gradient { round: 0 };
        let leaves = vec![LeafTask { leaf: 3, inline: None, handing: Handing::Summed }];
        let assignment = Assignment { work, leaves };
        let parameters = vec![0.0; engine.network.parameters()];
        let mut said = || {
            let outputs = Mutex::new(Vec::new());
            engine.compute(&assignment, Duration::ZERO, &parameters, &|output| outputs.lock().unwrap().push(output));
            outputs.into_inner().unwrap()
        };
        newest.came(work);
        let outputs = said();
        let [Output::Failed(reason)] = &outputs[..] else { panic!("{outputs:?}") };
        assert!(reason.contains("is not cached, and no samples came"), "{reason}");
        newest.end(work);
        assert!(said().is_empty());
    }

    /// Scenario: a round of a large dense model, by a worker that sends its gradients and by one that need not. Property: what
    /// is sent goes ahead of the end, the last layers first, announced as what is not computed yet; and it is the same.
    #[test]
    fn gradients_that_are_sent_go_ahead_in_parts() {
        let spec = example::spec_of("dense", 16);
        let data = example::data(&spec);
        let work = Work::Gradient { round: 0 };
        let outputs = |handover: Handover| {
            let cache = ShardCache::default();
            let leaves = 0..spec.schedule.tree.shards();
            for shard in leaves.clone().map(|shard| ShardRef { split: work.split(), shard }) {
                cache.insert(shard, data.shard(shard));
            }
            let newest = NewestWork::default();
            newest.came(work);
            let mut engine = Engine::new(spec.job(), Isa::best(), 2, cache, handover, newest).expect("a known model");
            let task = |leaf| LeafTask { leaf, inline: None, handing: Handing::Summed };
            let assignment = Assignment { work, leaves: leaves.map(task).collect() };
            let parameters: Vec<f32> = (0..engine.network.parameters()).map(|i| (i % 17) as f32 * 1e-3).collect();
            let said = Mutex::new(Vec::new());
            engine.compute(&assignment, Duration::ZERO, &parameters, &|output| said.lock().unwrap().push(output));
            said.into_inner().unwrap()
        };
        let at_once = outputs(Handover::InProcess);
        let [Output::Node { report: whole, gradient: Some(expected) }] = &at_once[..] else { panic!("{at_once:?}") };
        assert!(whole.compute.is_some());
        let ahead = outputs(Handover::Sent);
        let [Output::Node { report, gradient: None }, parts @ ..] = &ahead[..] else { panic!("{ahead:?}") };
        assert_eq!(*report, NodeReport { compute: None, ..whole.clone() });
        let mut end = expected.len();
        for part in parts {
            let Output::Part { chunk, gradient, compute, .. } = part else { panic!("{part:?}") };
            let start = *chunk as usize * CHUNK_FLOATS;
            assert!(gradient[..] == expected[start..end], "chunk {chunk}");
            assert_eq!(compute.is_some(), start == 0, "the last part says how long all of them took");
            end = start;
        }
        assert!(end == 0 && parts.len() > 1, "{} parts", parts.len());
    }
}
