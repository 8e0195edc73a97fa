//! Reduce, update, broadcast: one pipeline, chunk by chunk.
//!
//! The aggregator runs on a thread of its own. It combines the parts of tree nodes by position; as soon as a chunk's
//! root is complete it takes the optimizer step for that chunk and reports the new parameters. Version `v` stays
//! readable as a whole until version `v + 1` is.
//!
//! A step is taken only if the whole gradient and the loss are finite. Where all chunks become complete at once, that is
//! known before the first of them is touched: who made the gradient in this process has found out on the way
//! ([`FloatBuffer::is_known_finite`]), or it is looked at. Where chunks come one by one, the moments that a step changes are
//! kept until the last chunk is there, and are put back if that one is not finite.

mod chunk_task;
mod message;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use lockstep_common::hash::Digest;
use lockstep_common::kernel::Precision;
use lockstep_common::kernel::elementwise::AdamStep;
use lockstep_common::optim::Adam;
use lockstep_common::optim::adam::Moments;
use lockstep_common::progress::Aggregation;
use lockstep_common::protocol::{CHUNK_FLOATS, MemberId, NodeChunk, chunks, combine_chunk_digests, parameters_digest};
use lockstep_common::reduce::{NodeId, NodeSums, Reduction, Tree};
use lockstep_common::shared_memory::{FloatBuffer, Region};
use lockstep_proto::chunk::{to_bytes, to_halves};
use rayon::prelude::*;
use tokio::sync::mpsc;
use tracing::debug;

use crate::checkpoint::{Draft, Snapshots};
use crate::held::Held;
use crate::round::Step;
use chunk_task::{Chunk, ChunkTask, Part, Piece};
pub use message::{FromAggregator, Start, ToAggregator};

/// A node whose parts are awaited.
#[derive(Debug)]
struct Awaited {
    loss: f64,
    /// Which of its chunks are there.
    there: Vec<bool>,
}

/// How far a round is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// All that is complete is finite.
    Sound,
    /// Something is not finite: the rest is added, and no step is taken any more.
    NotFinite,
    /// All chunks are complete, and the next version is made, or nothing is changed.
    Done,
}

/// One round's state.
#[derive(Debug)]
struct Round {
    number: u64,
    samples: u32,
    /// Whether anybody wants the chunks one by one.
    broadcast: bool,
    step: AdamStep,
    awaited: HashMap<(MemberId, NodeId), Awaited>,
    held: Held<Vec<(usize, Piece)>>,
    /// Chunks whose sums are complete.
    complete: usize,
    stage: Stage,
    took: Aggregation,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Aggregator {
    tree: Tree,
    adam: Adam,
    /// What sums and steps are computed on, and what sums are rounded to.
    sums: NodeSums,
    parameters: Arc<FloatBuffer>,
    /// The next version in the making; there is one from a round's first update on, when workers have let go of the
    /// version before the current one. The first one's memory is taken while workers are not done with the first round.
    next: Option<FloatBuffer>,
    /// Earlier versions; their memory is used again once nobody reads them.
    retired: Vec<Arc<FloatBuffer>>,
    /// Where versions should lie, for workers in other processes to read.
    region: Option<Arc<Region>>,
    moments: Moments,
    chunks: Vec<Chunk>,
    /// Threads to add and update with, this one among them; there are none where they cannot be had.
    pool: Option<rayon::ThreadPool>,
    round: Option<Round>,
    /// Rounds that made the parameters, and the moments unless the next round has begun to change those.
    version: u64,
    snapshots: Snapshots,
    report: mpsc::UnboundedSender<FromAggregator>,
}

impl Aggregator {
    /// An aggregator that goes on from `start`, and puts later versions into slots of `region` if there are free ones.
    /// Reports are at most as many as chunks and nodes, so that their channel needs no bound of its own.
    pub fn new(
        tree: Tree,
        adam: Adam,
        sums: NodeSums,
        start: Start,
        snapshots: Snapshots,
        region: Option<Arc<Region>>,
        report: mpsc::UnboundedSender<FromAggregator>,
    ) -> Self {
        let Start { parameters, moments, version } = start;
        let len = parameters.len();
        Self {
            tree,
            adam,
            sums,
            next: None,
            retired: Vec::new(),
            moments,
            chunks: (0..len.div_ceil(CHUNK_FLOATS)).map(|_| Chunk::default()).collect(),
            pool: None,
            parameters,
            round: None,
            region,
            version,
            snapshots,
            report,
        }
    }

    /// Works until all senders are gone or nobody reads the reports any more.
    pub fn run(mut self, mut inbox: mpsc::Receiver<ToAggregator>) {
        // This thread does its part, so that it need not be woken when the others are done.
        let builder = rayon::ThreadPoolBuilder::new().thread_name(|i| format!("update-{i}")).use_current_thread();
        self.pool = builder.build().inspect_err(|error| debug!("updates use one thread: {error}")).ok();
        self.next = Some(self.buffer_for_next());
        loop {
            let idle = Instant::now();
            let Some(message) = inbox.blocking_recv() else { return };
            if let Some(round) = self.round.as_mut().filter(|round| !round.awaited.is_empty()) {
                round.took.upload += idle.elapsed();
            }
            if self.handle(message).is_err() {
                return;
            }
        }
    }

    fn handle(&mut self, message: ToAggregator) -> Result<(), Closed> {
        match message {
            ToAggregator::Begin { round, samples, step, chunks } => self.begin(round, samples, step, chunks),
            ToAggregator::Expect(member, node, loss) => {
                let there = vec![false; self.chunks.len()];
                if let Some(round) = &mut self.round {
                    round.awaited.insert((member, node), Awaited { loss, there });
                }
            }
            ToAggregator::Skip { round } => self.skip(round)?,
            ToAggregator::Checkpoint(draft) => self.checkpoint(*draft),
            ToAggregator::Hold(member) => self.round.iter_mut().for_each(|round| round.held.hold(member)),
            ToAggregator::Release(member) => {
                let Some(round) = &mut self.round else { return Ok(()) };
                let (number, held) = (round.number, round.held.release(member));
                held.into_iter().try_for_each(|(node, pieces)| self.take(member, number, node, pieces))?;
            }
            ToAggregator::Discard(member) => {
                let Some(round) = &mut self.round else { return Ok(()) };
                round.awaited.retain(|(id, _), _| *id != member);
                round.held.release(member);
            }
            ToAggregator::Chunk(member, part) => self.chunk(member, part)?,
            ToAggregator::Part { member, round, node, chunk, gradient } => {
                self.part(member, round, node, chunk, gradient)?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, round: u64, samples: u32, step: Step, broadcast: bool) {
        for chunk in &mut self.chunks {
            chunk.drop_root(self.sums.isa);
            chunk.sum = Some(Reduction::new(self.tree));
            chunk.stepped_early = false;
        }
        let Step { number, learning_rate } = step;
        let step = Adam { learning_rate, ..self.adam }.step(number, samples);
        self.round = Some(Round {
            number: round,
            samples,
            broadcast,
            step,
            awaited: HashMap::new(),
            held: Held::default(),
            complete: 0,
            stage: Stage::Sound,
            took: Aggregation::default(),
        });
    }

    fn chunk(&mut self, member: MemberId, part: NodeChunk) -> Result<(), Closed> {
        let Some((chunk, range)) = chunks(self.parameters.len()).nth(part.chunk as usize) else {
            let reason = format!("chunk {} does not exist, the parameters have {}", part.chunk, self.chunks.len());
            return self.send(FromAggregator::Violation { member, reason });
        };
        if part.data.len() != range.len() {
            let reason = format!("chunk {chunk} has {} floats, {} were sent", range.len(), part.data.len());
            return self.send(FromAggregator::Violation { member, reason });
        }
        self.take(member, part.round, part.node, vec![(chunk as usize, Piece::Owned(part.data))])
    }

    fn part(
        &mut self,
        member: MemberId,
        round: u64,
        node: NodeId,
        first: u32,
        gradient: Arc<FloatBuffer>,
    ) -> Result<(), Closed> {
        let (start, parameters) = (first as usize * CHUNK_FLOATS, self.parameters.len());
        let rest = parameters.checked_sub(start);
        let fits = |rest: usize| {
            gradient.len() == rest || gradient.len() < rest && gradient.len().is_multiple_of(CHUNK_FLOATS)
        };
        if !rest.is_some_and(fits) {
            let floats = gradient.len();
            let reason = format!("{floats} floats of a gradient from chunk {first} on, for {parameters} parameters");
            return self.send(FromAggregator::Violation { member, reason });
        }
        let pieces = chunks(gradient.len());
        let pieces =
            pieces.map(|(chunk, range)| ((first + chunk) as usize, Piece::Shared(gradient.clone(), range))).collect();
        // The pieces alone keep it now, so that its memory is free as soon as they are added.
        drop(gradient);
        self.take(member, round, node, pieces)
    }

    /// Adds parts of an awaited node to the sums, and takes the optimizer step for the chunks that are complete then. What
    /// is not awaited is of another round or was checked and found wrong, and is dropped.
    fn take(&mut self, member: MemberId, number: u64, node: NodeId, pieces: Vec<(usize, Piece)>) -> Result<(), Closed> {
        let Some(round) = self.round.as_mut().filter(|round| round.number == number) else { return Ok(()) };
        let Some(Awaited { loss, there }) = round.awaited.get_mut(&(member, node)) else { return Ok(()) };
        let loss = *loss;
        let Some(pieces) = round.held.keep(member, node, pieces) else { return Ok(()) };
        pieces.iter().for_each(|&(chunk, _)| there[chunk] = true);
        if there.iter().all(|&there| there) {
            round.awaited.remove(&(member, node));
            self.send(FromAggregator::Arrived { member, round: number, node })?;
        }
        let mut next = self.next.take().unwrap_or_else(|| self.buffer_for_next());
        let complete = self.combine(node, loss, pieces, &mut next);
        let Some(Round { complete: all, stage, broadcast, .. }) = self.round else { return Ok(()) };
        let done = !complete.is_empty() && all == self.chunks.len();
        if broadcast && stage == Stage::Sound {
            for chunk in complete {
                self.send(updated(number + 1, chunk, &next, self.sums.precision))?;
            }
        }
        match (done, stage) {
            (true, Stage::Sound) => self.commit(next),
            (true, _) => {
                self.next = Some(next);
                self.withhold()
            }
            // Also for a node that comes when its round is made already, because it was hedged: nothing is made twice.
            (false, _) => {
                self.next = Some(next);
                Ok(())
            }
        }
    }

    /// Adds the pieces of a node to the sums of their chunks, and makes the chunks of `next` whose sums are complete, as
    /// long as everything is finite: each chunk on one thread, so that what is added is still near the core when the step is
    /// taken. Returns which sums are complete now.
    fn combine(&mut self, node: NodeId, loss: f64, pieces: Vec<(usize, Piece)>, next: &mut [f32]) -> Vec<usize> {
        let Some(round) = &mut self.round else { return Vec::new() };
        let started = Instant::now();
        let (sums, step, chunks) = (self.sums, round.step, self.chunks.len());
        let mut pieces_of: Vec<Option<Piece>> = Vec::new();
        pieces_of.resize_with(chunks, || None);
        pieces.into_iter().for_each(|(chunk, piece)| pieces_of[chunk] = Some(piece));
        let slices = next
            .chunks_mut(CHUNK_FLOATS)
            .zip(self.parameters.chunks(CHUNK_FLOATS))
            .zip(self.moments.first.chunks_mut(CHUNK_FLOATS))
            .zip(self.moments.second.chunks_mut(CHUNK_FLOATS));
        let tasks = slices.zip(&mut self.chunks).zip(pieces_of).enumerate();
        let mut tasks: Vec<ChunkTask<'_>> = tasks
            .filter_map(|(index, (((((updated, parameters), first_moment), second_moment), chunk), piece))| {
                let part = Some(Part::computed(piece?, loss));
                Some(ChunkTask { index, part, updated, parameters, first_moment, second_moment, chunk })
            })
            .collect();
        in_parallel(self.pool.as_ref(), &mut tasks, |task| task.reduce(sums, node));
        let reduced = Instant::now();
        round.took.reduce += reduced - started;
        tasks.retain(|task| task.chunk.root.is_some());
        round.complete += tasks.len();
        if tasks.iter().any(|task| !task.chunk.is_finite) {
            round.stage = Stage::NotFinite;
        }
        if round.stage == Stage::Sound {
            let (early, all) = (round.complete < chunks, self.parameters.len());
            in_parallel(self.pool.as_ref(), &mut tasks, |task| task.update(sums.isa, step, early, all));
        } else {
            tasks.iter_mut().for_each(|task| task.chunk.drop_root(sums.isa));
        }
        round.took.update += reduced.elapsed();
        tasks.iter().map(|task| task.index).collect()
    }

    /// All chunks are updated: the next version becomes the current one.
    fn commit(&mut self, next: FloatBuffer) -> Result<(), Closed> {
        let digest = combine_chunk_digests(self.chunks.iter().map(|chunk| chunk.digest));
        self.replace(next);
        self.reduced(digest, Some(self.parameters.clone()))
    }

    /// All sums are complete, and not finite: takes back the steps that were taken before that was known.
    fn withhold(&mut self) -> Result<(), Closed> {
        let Moments { first, second } = &mut self.moments;
        let moments = first.chunks_mut(CHUNK_FLOATS).zip(second.chunks_mut(CHUNK_FLOATS));
        for (chunk, (first, second)) in self.chunks.iter().zip(moments).filter(|(chunk, _)| chunk.stepped_early) {
            chunk.undo(first, second);
        }
        self.reduced(parameters_digest(&self.parameters), None)
    }

    fn reduced(&mut self, digest: Digest, parameters: Option<Arc<FloatBuffer>>) -> Result<(), Closed> {
        // The round stays: parts of nodes that are in the sum already are still awaited, and reported when they are whole.
        let Some(round) = &mut self.round else { return Ok(()) };
        round.stage = Stage::Done;
        let (number, samples, took) = (round.number, round.samples, round.took);
        let sum_of_squares: f64 = self.chunks.iter().fold(0.0, |sum, chunk| sum + chunk.sum_of_squares);
        let gradient_norm = sum_of_squares.sqrt() / f64::from(samples);
        self.send(FromAggregator::Reduced { round: number, gradient_norm, digest, parameters, took })
    }

    /// The version after a round whose step was withheld is the one before it, in memory of its own, so that it is handed
    /// out like any other. Chunks that were reported with other content go first: whoever waits for the rest is not to
    /// think that the version is whole.
    fn skip(&mut self, number: u64) -> Result<(), Closed> {
        let Some(round) = self.round.as_ref().filter(|round| round.number == number) else { return Ok(()) };
        if round.stage != Stage::Done || self.version != number {
            return Ok(());
        }
        let broadcast = round.broadcast;
        let mut next = self.next.take().unwrap_or_else(|| self.buffer_for_next());
        next.copy_from_slice(&self.parameters);
        self.replace(next);
        if broadcast {
            let (reported, others): (Vec<usize>, Vec<usize>) =
                (0..self.chunks.len()).partition(|&chunk| self.chunks[chunk].stepped_early);
            for chunk in reported.into_iter().chain(others) {
                self.send(updated(number + 1, chunk, &self.parameters, self.sums.precision))?;
            }
        }
        self.send(FromAggregator::Skipped { version: self.version, parameters: self.parameters.clone() })
    }

    /// Makes the next version the current one.
    fn replace(&mut self, next: FloatBuffer) {
        let old = std::mem::replace(&mut self.parameters, Arc::new(next));
        self.version += 1;
        self.retired.push(old);
    }

    /// Hands a snapshot to the writer, if the moments are still those of the version that is wanted.
    fn checkpoint(&mut self, draft: Draft) {
        let rounds = draft.state.standing.rounds;
        let changing = self
            .round
            .as_ref()
            .is_some_and(|round| round.number == self.version && round.complete > 0 && round.stage != Stage::Done);
        if rounds == self.version && !changing {
            self.snapshots.take(draft, &self.parameters, &self.moments);
        } else {
            self.snapshots.missed(&draft);
        }
    }

    /// Memory of a version that nobody reads any more, or new memory.
    fn buffer_for_next(&mut self) -> FloatBuffer {
        // Where versions can be shared, those that are not are not used again.
        let wanted = |version: &FloatBuffer| self.region.is_none() || version.slot().is_some();
        self.retired.retain(|version| wanted(version) || Arc::strong_count(version) > 1);
        let free = self.retired.iter().position(|version| wanted(version) && Arc::strong_count(version) == 1);
        let reused = free.and_then(|at| Arc::into_inner(self.retired.swap_remove(at)));
        let slot = || self.region.as_ref()?.take().map(FloatBuffer::from);
        reused.or_else(slot).unwrap_or_else(|| FloatBuffer::zeros(self.parameters.len()))
    }

    fn send(&self, report: FromAggregator) -> Result<(), Closed> {
        self.report.send(report).map_err(|_| Closed)
    }
}

/// The report that a chunk of a version is made.
fn updated(version: u64, chunk: usize, parameters: &[f32], precision: Precision) -> FromAggregator {
    let start = chunk * CHUNK_FLOATS;
    let values = &parameters[start..(start + CHUNK_FLOATS).min(parameters.len())];
    let data = match precision {
        Precision::F32 => to_bytes(values),
        Precision::Bf16 => to_halves(values),
    };
    FromAggregator::Updated { version, chunk: chunk as u32, data }
}

fn in_parallel<'a>(
    pool: Option<&rayon::ThreadPool>,
    tasks: &mut [ChunkTask<'a>],
    run: impl Fn(&mut ChunkTask<'a>) + Sync + Send,
) {
    match pool {
        Some(pool) if tasks.len() > 1 => pool.install(|| tasks.par_iter_mut().for_each(run)),
        _ => tasks.iter_mut().for_each(run),
    }
}

/// Nobody reads the reports any more.
struct Closed;

#[cfg(test)]
mod tests {
    use lockstep_common::kernel::Isa;
    use lockstep_common::protocol::Bytes;

    use super::*;
    use crate::checkpoint::CheckpointWriter;

    /// An aggregator of two leaves, and what it reports.
    struct Bench {
        aggregator: Aggregator,
        reports: mpsc::UnboundedReceiver<FromAggregator>,
        writer: CheckpointWriter,
        _directory: tempfile::TempDir,
    }

    fn member(worker: u32) -> MemberId {
        MemberId { worker, incarnation: 1 }
    }

    fn bench(parameters: Vec<f32>) -> Bench {
        bench_with(NodeSums { isa: Isa::SCALAR, precision: Precision::F32 }, parameters)
    }

    fn bench_with(sums: NodeSums, parameters: Vec<f32>) -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let (troubles, _) = std::sync::mpsc::channel();
        let (settled, _) = mpsc::unbounded_channel();
        let (writer, snapshots) = CheckpointWriter::start(directory.path(), 1, None, settled, troubles).unwrap();
        let start = Start::fresh(parameters.into());
        let (report, reports) = mpsc::unbounded_channel();
        let tree = Tree::over(2).unwrap();
        let aggregator = Aggregator::new(tree, Adam::default(), sums, start, snapshots, None, report);
        Bench { aggregator, reports, writer, _directory: directory }
    }

    impl Bench {
        fn tell(&mut self, message: ToAggregator) -> Vec<FromAggregator> {
            assert!(self.aggregator.handle(message).is_ok());
            std::iter::from_fn(|| self.reports.try_recv().ok()).collect()
        }

        fn begin(&mut self, round: u64, number: u64, chunks: bool) {
            let step = Step { number, learning_rate: 1e-3 };
            self.tell(ToAggregator::Begin { round, samples: 4, step, chunks });
        }

        /// A member announces a leaf and hands in its gradient as a whole.
        fn leaf(&mut self, round: u64, worker: u32, leaf: u32, loss: f64, gradient: Vec<f32>) -> Vec<FromAggregator> {
            let node = NodeId::leaf(leaf);
            self.tell(ToAggregator::Expect(member(worker), node, loss));
            let gradient = Arc::new(gradient.into());
            self.tell(ToAggregator::Part { member: member(worker), round, node, chunk: 0, gradient })
        }

        fn end(self) {
            drop(self.aggregator);
            self.writer.finish();
        }
    }

    /// What a round has made: the parameters, or nothing if they stay.
    fn made(reports: &[FromAggregator]) -> Option<Option<Arc<FloatBuffer>>> {
        reports.iter().find_map(|report| match report {
            FromAggregator::Reduced { parameters, .. } => Some(parameters.clone()),
            _ => None,
        })
    }

    /// Scenario: the nodes of a run are bfloat16 numbers, and two leaves meet here. Property: their sum is rounded, as a
    /// worker that computed both would have rounded it.
    #[test]
    fn sums_are_rounded_to_what_nodes_are() {
        let norm = |precision| {
            let mut bench = bench_with(NodeSums { isa: Isa::SCALAR, precision }, vec![0.0]);
            bench.begin(0, 1, false);
            bench.leaf(0, 1, 0, 1.0, vec![256.0]);
            let reports = bench.leaf(0, 2, 1, 1.0, vec![3.0]);
            bench.end();
            let norm = reports.iter().find_map(|report| match report {
                FromAggregator::Reduced { gradient_norm, .. } => Some(*gradient_norm),
                _ => None,
            });
            norm.expect("a round that is made") * 4.0
        };
        // Between 256 and 512 there is a bfloat16 number every 2; of two as near, the even one is taken.
        assert_eq!([Precision::F32, Precision::Bf16].map(norm), [259.0, 260.0]);
    }

    /// Scenario: a worker hands in the root, and has found on the way that it is finite, or has not looked. Property: the same
    /// version and the same norm.
    #[test]
    fn what_a_worker_has_found_out_changes_nothing() {
        let values: Vec<f32> = (0..CHUNK_FLOATS + 21).map(|i| (i % 97) as f32 - 50.0).collect();
        let root = NodeId { level: 1, index: 0 };
        let made_of = |known: bool| {
            let mut bench = bench(vec![1.0; values.len()]);
            bench.begin(0, 1, false);
            bench.tell(ToAggregator::Expect(member(1), root, 1.0));
            let mut gradient = FloatBuffer::from(values.clone());
            if known {
                gradient.set_known_finite();
            }
            let gradient = Arc::new(gradient);
            let reports =
                bench.tell(ToAggregator::Part { member: member(1), round: 0, node: root, chunk: 0, gradient });
            bench.end();
            let made = reports.into_iter().find_map(|report| match report {
                FromAggregator::Reduced { gradient_norm, digest, parameters, .. } => {
                    Some((gradient_norm, digest, parameters.unwrap()))
                }
                _ => None,
            });
            made.expect("a round that is made")
        };
        let squares: f64 = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        let (norm, digest, parameters) = made_of(true);
        assert!((norm - squares.sqrt() / 4.0).abs() < 1e-9 * norm, "{norm}");
        assert_eq!((norm, digest, parameters), made_of(false));
    }

    /// Scenario: two members hand in the same node, as when it was hedged; one of them after the round is made. Property:
    /// the round is made once, from the version before it, and the next one from what it made.
    #[test]
    fn a_node_that_comes_late_makes_nothing_twice() {
        let mut bench = bench(vec![1.0, 2.0]);
        let mut versions = Vec::new();
        for round in 0..2 {
            bench.begin(round, round + 1, false);
            let leaves = [(1, 0), (2, 1), (3, 1)];
            leaves.iter().for_each(|&(worker, leaf)| {
                bench.tell(ToAggregator::Expect(member(worker), NodeId::leaf(leaf), 1.0));
            });
            let reports =
                leaves.iter().flat_map(|&(worker, leaf)| bench.leaf(round, worker, leaf, 1.0, vec![3.0, leaf as f32]));
            let reports: Vec<FromAggregator> = reports.collect();
            assert_eq!(reports.iter().filter(|report| matches!(report, FromAggregator::Reduced { .. })).count(), 1);
            versions.extend(made(&reports).flatten());
        }
        let [first, second] = &versions[..] else { panic!("{versions:?}") };
        assert!(first[0] < 1.0 && second[0] < first[0] && second[1] < first[1], "{versions:?}");
        bench.end();
    }

    /// Scenario: a round is not finite, by its loss or by one number of its gradient, and is skipped. Property: parameters
    /// and moments stay as they were, so that the next round makes what it would have made without the skipped one.
    #[test]
    fn a_round_that_is_not_finite_changes_nothing() {
        let calm = {
            let mut bench = bench(vec![1.0, 2.0]);
            bench.begin(0, 1, false);
            bench.leaf(0, 1, 0, 1.0, vec![1.0, 2.0]);
            let version = made(&bench.leaf(0, 1, 1, 1.0, vec![3.0, 4.0])).unwrap().unwrap();
            bench.end();
            version
        };
        for (loss, last) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, f32::NAN), (1.0, f32::NEG_INFINITY)] {
            let mut bench = bench(vec![1.0, 2.0]);
            bench.begin(0, 1, false);
            bench.leaf(0, 1, 0, loss, vec![1.0, last]);
            assert_eq!(made(&bench.leaf(0, 1, 1, 1.0, vec![3.0, 4.0])), Some(None), "{loss} {last}");
            let skipped = bench.tell(ToAggregator::Skip { round: 0 });
            let [FromAggregator::Skipped { version: 1, parameters }] = &skipped[..] else { panic!("{skipped:?}") };
            assert_eq!(parameters[..], [1.0, 2.0]);
            bench.begin(1, 1, false);
            bench.leaf(1, 1, 0, 1.0, vec![1.0, 2.0]);
            assert_eq!(made(&bench.leaf(1, 1, 1, 1.0, vec![3.0, 4.0])), Some(Some(calm.clone())), "{loss} {last}");
            bench.end();
        }
    }

    /// Scenario: the chunks of a round come one by one, and only the last one is not finite. Property: the steps that were
    /// taken are taken back, and whoever got the new chunks gets the old ones before the version can become whole.
    #[test]
    fn a_late_chunk_that_is_not_finite_takes_back_the_others() {
        let floats = CHUNK_FLOATS + 5;
        let mut bench = bench(vec![1.0; floats]);
        let send = |bench: &mut Bench, round: u64, chunk: u32, data: Vec<f32>| {
            bench.tell(ToAggregator::Chunk(
                member(1),
                NodeChunk { round, node: NodeId { level: 1, index: 0 }, chunk, data },
            ))
        };
        let root = NodeId { level: 1, index: 0 };
        let expect = |bench: &mut Bench| drop(bench.tell(ToAggregator::Expect(member(1), root, 1.0)));
        let chunks = |reports: &[FromAggregator]| -> Vec<(u32, bool)> {
            let old = |data: &Bytes| data.chunks(4).all(|value| value == 1f32.to_le_bytes());
            let chunk = |report: &FromAggregator| match report {
                FromAggregator::Updated { version: 1, chunk, data } => Some((*chunk, old(data))),
                _ => None,
            };
            reports.iter().filter_map(chunk).collect()
        };
        bench.begin(0, 1, true);
        expect(&mut bench);
        assert_eq!(chunks(&send(&mut bench, 0, 1, vec![2.0; 5])), [(1, false)]);
        let moments = bench.aggregator.moments.clone();
        assert_ne!(moments, Moments::zero(floats));
        let reports = send(&mut bench, 0, 0, vec![f32::INFINITY; CHUNK_FLOATS]);
        assert_eq!((made(&reports), chunks(&reports)), (Some(None), vec![]));
        assert_eq!(bench.aggregator.moments, Moments::zero(floats));
        assert_eq!(chunks(&bench.tell(ToAggregator::Skip { round: 0 })), [(1, true), (0, true)]);
        assert!(bench.tell(ToAggregator::Skip { round: 0 }).is_empty(), "a round is skipped once");
        bench.end();
    }
}
