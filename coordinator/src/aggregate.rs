//! Reduce, update, broadcast: one pipeline, chunk by chunk.
//!
//! The aggregator runs on a thread of its own. It combines the parts of tree nodes by position; as soon as a chunk's
//! root is complete it takes the optimizer step for that chunk and reports the new parameters. Version `v` stays
//! readable as a whole until version `v + 1` is.

mod chunk_task;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_common::hash::Digest;
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::elementwise::AdamStep;
use lockstep_common::optim::Adam;
use lockstep_common::optim::adam::Moments;
use lockstep_common::progress::Aggregation;
use lockstep_common::protocol::{Bytes, CHUNK_FLOATS, MemberId, NodeChunk, chunks, combine_chunk_digests};
use lockstep_common::reduce::{NodeId, Reduction, Tree};
use lockstep_common::shared_memory::{FloatBuffer, Region};
use lockstep_proto::chunk::to_bytes;
use rayon::prelude::*;
use tokio::sync::mpsc;
use tracing::debug;

use crate::checkpoint::{Draft, Snapshots};
use crate::held::Held;
use chunk_task::{Chunk, ChunkTask, ChunkTimes, Piece};

/// What the aggregator is told, in this order for each round: one `Begin`; then, for each node, one `Expect` before the
/// parts of its gradient.
#[derive(Debug)]
pub enum ToAggregator {
    /// A round starts.
    Begin {
        /// Which round.
        round: u64,
        /// Samples in its global batch.
        samples: u32,
        /// Whether anybody wants the new parameters chunk by chunk.
        chunks: bool,
    },
    /// The member's node was checked; its parts are welcome.
    Expect(MemberId, NodeId),
    /// Take a snapshot for a checkpoint, before the next `Begin`.
    Checkpoint(Box<Draft>),
    /// From now on, what comes of a member is to be kept out of the sum until it is released.
    Hold(MemberId),
    /// What is held of a member goes into the sum, and so does what still comes of its nodes.
    Release(MemberId),
    /// What is held of a member is thrown away, and so is what still comes of its nodes.
    Discard(MemberId),
    /// A part of a node's gradient.
    Chunk(MemberId, NodeChunk),
    /// A node's whole gradient, from a worker that shares the memory that it lies in.
    Whole {
        /// Who computed it.
        member: MemberId,
        /// Round of the gradient.
        round: u64,
        /// Which node.
        node: NodeId,
        /// The flat vector.
        gradient: Arc<FloatBuffer>,
    },
}

/// What the aggregator reports.
#[derive(Debug)]
pub enum FromAggregator {
    /// All parts of a node are there.
    Arrived {
        /// Who sent them.
        member: MemberId,
        /// Round of the gradient.
        round: u64,
        /// Which node.
        node: NodeId,
    },
    /// A chunk of the next version is made.
    Updated {
        /// Rounds that make the version.
        version: u64,
        /// Which chunk.
        chunk: u32,
        /// Little-endian floats.
        data: Bytes,
    },
    /// The next version is whole.
    Reduced {
        /// The round that made it.
        round: u64,
        /// Euclidean norm of the mean gradient.
        gradient_norm: f64,
        /// Digest of the parameters.
        digest: Digest,
        /// The parameters.
        parameters: Arc<FloatBuffer>,
        /// What the round took here.
        took: Aggregation,
    },
    /// A member sent what cannot be.
    Violation {
        /// Who.
        member: MemberId,
        /// What.
        reason: String,
    },
}

/// What an aggregator starts from.
#[derive(Debug)]
pub struct Start {
    /// The parameters.
    pub parameters: Arc<FloatBuffer>,
    /// The optimizer's moments.
    pub moments: Moments,
    /// Rounds that made them.
    pub version: u64,
}

/// One round's state.
#[derive(Debug)]
struct Round {
    number: u64,
    samples: u32,
    /// Whether anybody wants the chunks one by one.
    broadcast: bool,
    step: AdamStep,
    /// For each awaited node, which of its chunks are there.
    awaited: HashMap<(MemberId, NodeId), Vec<bool>>,
    held: Held<Vec<(usize, Piece)>>,
    updated: usize,
    took: Aggregation,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Aggregator {
    tree: Tree,
    adam: Adam,
    isa: Isa,
    parameters: Arc<FloatBuffer>,
    /// The next version in the making; there is one from a round's first update on, when workers have let go of the
    /// version before the current one.
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
        isa: Isa,
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
            isa,
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
            ToAggregator::Begin { round, samples, chunks } => self.begin(round, samples, chunks),
            ToAggregator::Expect(member, node) => {
                let chunks = self.chunks.len();
                if let Some(round) = &mut self.round {
                    round.awaited.insert((member, node), vec![false; chunks]);
                }
            }
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
            ToAggregator::Whole { member, round, node, gradient } => self.whole(member, round, node, gradient)?,
        }
        Ok(())
    }

    fn begin(&mut self, round: u64, samples: u32, broadcast: bool) {
        self.chunks.iter_mut().for_each(|chunk| chunk.sum = Some(Reduction::new(self.tree)));
        let step = self.adam.step(round + 1, samples);
        self.round = Some(Round {
            number: round,
            samples,
            broadcast,
            step,
            awaited: HashMap::new(),
            held: Held::default(),
            updated: 0,
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

    fn whole(&mut self, member: MemberId, round: u64, node: NodeId, gradient: Arc<FloatBuffer>) -> Result<(), Closed> {
        if gradient.len() != self.parameters.len() {
            let reason = format!("a gradient of {} floats for {} parameters", gradient.len(), self.parameters.len());
            return self.send(FromAggregator::Violation { member, reason });
        }
        let pieces = chunks(gradient.len());
        let pieces = pieces.map(|(chunk, range)| (chunk as usize, Piece::Shared(gradient.clone(), range))).collect();
        // The pieces alone keep it now, so that its memory is free as soon as they are added.
        drop(gradient);
        self.take(member, round, node, pieces)
    }

    /// Adds parts of an awaited node to the sums, and takes the optimizer step for the chunks that are complete then. What
    /// is not awaited is of another round or was checked and found wrong, and is dropped.
    fn take(&mut self, member: MemberId, number: u64, node: NodeId, pieces: Vec<(usize, Piece)>) -> Result<(), Closed> {
        let Some(round) = self.round.as_mut().filter(|round| round.number == number) else { return Ok(()) };
        let Some(there) = round.awaited.get_mut(&(member, node)) else { return Ok(()) };
        let Some(pieces) = round.held.keep(member, node, pieces) else { return Ok(()) };
        pieces.iter().for_each(|&(chunk, _)| there[chunk] = true);
        if there.iter().all(|&there| there) {
            round.awaited.remove(&(member, node));
            self.send(FromAggregator::Arrived { member, round: number, node })?;
        }
        let mut next = self.next.take().unwrap_or_else(|| self.buffer_for_next());
        let updated = self.combine(node, pieces, &mut next);
        if updated.is_empty() {
            // Also for a node that comes when its round is made already, because it was hedged: nothing is made twice.
            self.next = Some(next);
            return Ok(());
        }
        let Some(round) = &mut self.round else { return Ok(()) };
        round.updated += updated.len();
        let (done, version) = (round.updated == self.chunks.len(), number + 1);
        if round.broadcast {
            for chunk in updated {
                let start = chunk * CHUNK_FLOATS;
                let data = to_bytes(&next[start..(start + CHUNK_FLOATS).min(next.len())]);
                self.send(FromAggregator::Updated { version, chunk: chunk as u32, data })?;
            }
        }
        if done {
            return self.commit(next);
        }
        self.next = Some(next);
        Ok(())
    }

    /// Adds the pieces of a node to the sums of their chunks, and makes the chunks of `next` whose sums are complete: each
    /// chunk on one thread, so that what is added is still near the core when the step is taken. Returns which are made.
    fn combine(&mut self, node: NodeId, pieces: Vec<(usize, Piece)>, next: &mut [f32]) -> Vec<usize> {
        let Some(round) = &mut self.round else { return Vec::new() };
        let started = Instant::now();
        let (isa, step) = (self.isa, round.step);
        let mut pieces_of: Vec<Option<Piece>> = Vec::new();
        pieces_of.resize_with(self.chunks.len(), || None);
        pieces.into_iter().for_each(|(chunk, piece)| pieces_of[chunk] = Some(piece));
        let slices = next
            .chunks_mut(CHUNK_FLOATS)
            .zip(self.parameters.chunks(CHUNK_FLOATS))
            .zip(self.moments.first.chunks_mut(CHUNK_FLOATS))
            .zip(self.moments.second.chunks_mut(CHUNK_FLOATS));
        let tasks = slices.zip(&mut self.chunks).zip(pieces_of).enumerate();
        let mut tasks: Vec<ChunkTask<'_>> = tasks
            .filter_map(|(index, (((((updated, parameters), first_moment), second_moment), chunk), piece))| {
                Some(ChunkTask { index, piece: Some(piece?), updated, parameters, first_moment, second_moment, chunk })
            })
            .collect();
        let run = |task: &mut ChunkTask<'_>| task.run(isa, step, node);
        let took: Vec<ChunkTimes> = match &self.pool {
            Some(pool) if tasks.len() > 1 => pool.install(|| tasks.par_iter_mut().map(run).collect()),
            _ => tasks.iter_mut().map(run).collect(),
        };
        let sum = |part: fn(&ChunkTimes) -> Duration| took.iter().map(part).sum::<Duration>();
        let (reduce, update) = (sum(|times| times.reduce), sum(|times| times.update.unwrap_or_default()));
        // Several threads' times, as parts of the time that passed.
        let passed = started.elapsed();
        let share = reduce.as_secs_f64() / (reduce + update).as_secs_f64().max(f64::MIN_POSITIVE);
        let reduced = passed.mul_f64(share.clamp(0.0, 1.0)).min(passed);
        round.took.reduce += reduced;
        round.took.update += passed - reduced;
        let updated = tasks.iter().zip(&took).filter(|(_, times)| times.update.is_some());
        updated.map(|(task, _)| task.index).collect()
    }

    /// All chunks are updated: the next version becomes the current one.
    fn commit(&mut self, next: FloatBuffer) -> Result<(), Closed> {
        let Some(round) = &self.round else { return Ok(()) };
        // The round stays: parts of nodes that are in the sum already are still awaited, and reported when they are whole.
        let (number, samples, took) = (round.number, round.samples, round.took);
        let sum_of_squares: f64 = self.chunks.iter().fold(0.0, |sum, chunk| sum + chunk.sum_of_squares);
        let made = Arc::new(next);
        let old = std::mem::replace(&mut self.parameters, made);
        self.version = number + 1;
        self.retired.push(old);
        self.send(FromAggregator::Reduced {
            round: number,
            gradient_norm: sum_of_squares.sqrt() / f64::from(samples),
            digest: combine_chunk_digests(self.chunks.iter().map(|chunk| chunk.digest)),
            parameters: self.parameters.clone(),
            took,
        })
    }

    /// Hands a snapshot to the writer, if the moments are still those of the version that is wanted.
    fn checkpoint(&mut self, draft: Draft) {
        let rounds = draft.state.standing.rounds;
        let changing = self.round.as_ref().is_some_and(|round| round.number == self.version && round.updated > 0);
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
        let slot = || self.region.as_ref()?.take().map(FloatBuffer::Shared);
        reused.or_else(slot).unwrap_or_else(|| vec![0.0; self.parameters.len()].into())
    }

    fn send(&self, report: FromAggregator) -> Result<(), Closed> {
        self.report.send(report).map_err(|_| Closed)
    }
}

/// Nobody reads the reports any more.
struct Closed;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::CheckpointWriter;

    /// Scenario: two members hand in the same node, as when it was hedged; one of them after the round is made. Property:
    /// the round is made once, from the version before it, and the next one from what it made.
    #[test]
    fn a_node_that_comes_late_makes_nothing_twice() {
        let directory = tempfile::tempdir().unwrap();
        let (troubles, _) = std::sync::mpsc::channel();
        let (settled, _) = mpsc::unbounded_channel();
        let (writer, snapshots) = CheckpointWriter::start(directory.path(), 1, None, settled, troubles).unwrap();
        let parameters: Arc<FloatBuffer> = Arc::new(vec![1.0, 2.0].into());
        let start = Start { parameters, moments: Moments::zero(2), version: 0 };
        let (report, mut reports) = mpsc::unbounded_channel();
        let tree = Tree::over(2).unwrap();
        let mut aggregator = Aggregator::new(tree, Adam::default(), Isa::SCALAR, start, snapshots, None, report);
        let member = |worker| MemberId { worker, incarnation: 1 };
        let mut tell = |message| assert!(aggregator.handle(message).is_ok());
        let mut made = Vec::new();
        for round in 0..2 {
            tell(ToAggregator::Begin { round, samples: 4, chunks: false });
            let nodes = [(1, 0), (2, 1), (3, 1)].map(|(worker, leaf)| (member(worker), NodeId::leaf(leaf)));
            nodes.iter().for_each(|&(member, node)| tell(ToAggregator::Expect(member, node)));
            for (member, node) in nodes {
                let gradient = Arc::new(vec![3.0, node.index as f32].into());
                tell(ToAggregator::Whole { member, round, node, gradient });
            }
            let reports = std::iter::from_fn(|| reports.try_recv().ok());
            let reduced = reports.filter_map(|report| match report {
                FromAggregator::Reduced { round, parameters, .. } => Some((round, parameters)),
                _ => None,
            });
            made.extend(reduced);
        }
        let [(0, first), (1, second)] = &made[..] else { panic!("{made:?}") };
        assert!(first[0] < 1.0 && second[0] < first[0] && second[1] < first[1], "{made:?}");
        drop(aggregator);
        writer.finish();
    }
}
