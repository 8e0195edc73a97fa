//! What is done to one chunk of the parameters: adding a piece of a gradient, and the optimizer step.

use std::ops::Range;
use std::sync::Arc;

use lockstep_common::hash::{Digest, DigestBuilder};
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::elementwise::{AdamSlices, AdamStep, SquareSum};
use lockstep_common::kernel::streaming::write_past_caches;
use lockstep_common::optim::adam;
use lockstep_common::reduce::{NodeId, NodeSums, Reduction, add_nodes};
use lockstep_common::shared_memory::FloatBuffer;

/// How many parts' memory is kept for each chunk: as many as wait for their siblings when four workers send two nodes each.
const MAX_SPARE: usize = 8;

/// A part of a node's gradient, wherever it lies.
#[derive(Debug)]
pub(super) enum Piece {
    Owned(Vec<f32>),
    Shared(Arc<FloatBuffer>, Range<usize>),
}

impl Piece {
    fn values(&self) -> &[f32] {
        match self {
            Piece::Owned(values) => values,
            Piece::Shared(gradient, range) => &gradient[range.clone()],
        }
    }

    fn is_known_finite(&self) -> bool {
        match self {
            Piece::Owned(_) => false,
            Piece::Shared(gradient, _) => gradient.is_known_finite(),
        }
    }
}

/// A piece, with the loss of its whole node.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) piece: Piece,
    pub(super) loss: f64,
    /// The sum of the piece's squares, if it was on hand.
    pub(super) sum_of_squares: Option<f64>,
}

impl Part {
    /// A part that a worker computed.
    pub(super) fn computed(piece: Piece, loss: f64) -> Self {
        Self { piece, loss, sum_of_squares: None }
    }

    fn sum_of_squares(&self, isa: Isa) -> f64 {
        self.sum_of_squares.unwrap_or_else(|| {
            let mut squares = SquareSum::default();
            squares.add(isa, self.piece.values());
            squares.total()
        })
    }

    /// The sum of two siblings.
    fn sum(sums: NodeSums, spare: &mut Vec<Vec<f32>>, left: Self, right: Self) -> Self {
        let (piece, squares) = add(sums, spare, left.piece, right.piece);
        Self { piece, loss: left.loss + right.loss, sum_of_squares: Some(squares.total()) }
    }
}

/// What belongs to a chunk of the parameters from round to round.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// The sum in the making; none when it was complete.
    pub(super) sum: Option<Reduction<Part>>,
    /// The complete sum, until the step is taken.
    pub(super) root: Option<Part>,
    /// Memory of parts that were added to others.
    spare: Vec<Vec<f32>>,
    /// Of the last gradient: found out while the step is taken, or when it is dropped.
    pub(super) sum_of_squares: f64,
    /// Whether the complete sum and its loss are finite.
    pub(super) is_finite: bool,
    /// Of the last version.
    pub(super) digest: Digest,
    /// The moments before the round at hand, if its step was taken here while other chunks' sums were not complete.
    before: [Vec<f32>; 2],
    pub(super) stepped_early: bool,
}

impl Chunk {
    /// Keeps the moments, so that a step can be taken back.
    pub(super) fn keep(&mut self, first_moment: &[f32], second_moment: &[f32]) {
        for (before, moment) in self.before.iter_mut().zip([first_moment, second_moment]) {
            before.clear();
            before.extend_from_slice(moment);
        }
        self.stepped_early = true;
    }

    /// Takes a step back.
    pub(super) fn undo(&self, first_moment: &mut [f32], second_moment: &mut [f32]) {
        let [first, second] = &self.before;
        first_moment.copy_from_slice(first);
        second_moment.copy_from_slice(second);
    }

    /// Drops a sum that no step will be taken for.
    pub(super) fn drop_root(&mut self, isa: Isa) {
        if let Some(root) = self.root.take() {
            self.sum_of_squares = root.sum_of_squares(isa);
            recycle(&mut self.spare, root.piece);
        }
    }
}

/// A part of a node, and everything that it may change.
pub(super) struct ChunkTask<'a> {
    pub(super) index: usize,
    pub(super) part: Option<Part>,
    pub(super) updated: &'a mut [f32],
    pub(super) parameters: &'a [f32],
    pub(super) first_moment: &'a mut [f32],
    pub(super) second_moment: &'a mut [f32],
    pub(super) chunk: &'a mut Chunk,
}

impl ChunkTask<'_> {
    /// Adds the part; if the sum is complete then, takes it out, and finds out whether it is finite.
    pub(super) fn reduce(&mut self, sums: NodeSums, node: NodeId) {
        let Chunk { sum, root, spare, is_finite, .. } = &mut *self.chunk;
        let (Some(adding), Some(part)) = (sum.as_mut(), self.part.take()) else { return };
        adding.insert(node, part, |left, right| Part::sum(sums, spare, left, right));
        let Some(mut complete) = adding.take_root() else { return };
        *sum = None;
        if !complete.piece.is_known_finite() {
            complete.sum_of_squares = Some(complete.sum_of_squares(sums.isa));
        }
        *is_finite = complete.loss.is_finite() && complete.sum_of_squares.is_none_or(f64::is_finite);
        *root = Some(complete);
    }

    /// Takes the optimizer step for a chunk whose sum is complete. With `early`, it can be taken back. `all` is the number of
    /// parameters of all chunks.
    pub(super) fn update(&mut self, isa: Isa, step: AdamStep, early: bool, all: usize) {
        let Self { updated, parameters, first_moment, second_moment, chunk, .. } = self;
        let Some(Part { piece, .. }) = chunk.root.take() else { return };
        if early {
            chunk.keep(first_moment, second_moment);
        }
        let gradient_sum = piece.values();
        let slices = AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated };
        (chunk.digest, chunk.sum_of_squares) = take_step(isa, step, slices, all > MAX_CACHED);
        recycle(&mut chunk.spare, piece);
    }
}

/// Floats that are gone through at a time, so that nothing is read from memory twice: five slices of a block are 5 KiB, which
/// fit in any L1 cache. While the digest of a block is taken, memory is not asked for anything: with larger blocks, what was
/// asked for before has come by then.
const BLOCK: usize = 256;

/// Parameters of which the next round may still find some in a cache: a step goes through 20 bytes for each of them.
const MAX_CACHED: usize = 2 << 20;

/// Takes the optimizer step. Returns the digest of the updated parameters, and the sum of the gradient's squares. With
/// `past_caches`, parameters are written to memory at once.
fn take_step(isa: Isa, step: AdamStep, slices: AdamSlices<'_>, past_caches: bool) -> (Digest, f64) {
    let AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated } = slices;
    let (mut digest, mut squares) = (DigestBuilder::default(), SquareSum::default());
    let read = parameters.chunks(BLOCK).zip(gradient_sum.chunks(BLOCK));
    let blocks = read.zip(first_moment.chunks_mut(BLOCK).zip(second_moment.chunks_mut(BLOCK)));
    let mut take = |((parameters, gradient_sum), (first_moment, second_moment)), updated: &mut [f32]| {
        let slices = AdamSlices { parameters, gradient_sum, first_moment, second_moment, updated: &mut *updated };
        adam::apply(isa, step, slices, &mut squares);
        digest.floats(updated);
    };
    if past_caches {
        let mut at_hand = [0.0; BLOCK];
        write_past_caches(isa, updated, |target| {
            for block in blocks {
                let at_hand = &mut at_hand[..block.0.0.len()];
                take(block, at_hand);
                target.append(at_hand);
            }
        });
    } else {
        blocks.zip(updated.chunks_mut(BLOCK)).for_each(|(block, updated)| take(block, updated));
    }
    (digest.finish(), squares.total())
}

/// The sum of two siblings, in the memory of the left one if it is ours, and its squares.
fn add(sums: NodeSums, spare: &mut Vec<Vec<f32>>, left: Piece, right: Piece) -> (Piece, SquareSum) {
    let mut squares = SquareSum::default();
    let mut add_block = |sum: &mut [f32], right: &[f32]| {
        add_nodes(sums, sum, right);
        squares.add(sums.isa, sum);
    };
    let right_blocks = right.values().chunks(BLOCK);
    let sum = match left {
        Piece::Owned(mut sum) => {
            sum.chunks_mut(BLOCK).zip(right_blocks).for_each(|(sum, right)| add_block(sum, right));
            sum
        }
        Piece::Shared(..) => {
            let mut sum = spare.pop().unwrap_or_default();
            sum.clear();
            for (left, right) in left.values().chunks(BLOCK).zip(right_blocks) {
                let start = sum.len();
                sum.extend_from_slice(left);
                add_block(&mut sum[start..], right);
            }
            sum
        }
    };
    recycle(spare, right);
    (Piece::Owned(sum), squares)
}

fn recycle(spare: &mut Vec<Vec<f32>>, piece: Piece) {
    if let (Piece::Owned(values), true) = (piece, spare.len() < MAX_SPARE) {
        spare.push(values);
    }
}

#[cfg(test)]
mod tests {
    use lockstep_common::optim::Adam;

    use super::*;

    /// Scenario: a step for a block and a half, through the caches and past them. Property: the same parameters, moments,
    /// digest and squares.
    #[test]
    fn a_step_past_the_caches_is_the_same() {
        const LEN: usize = BLOCK + BLOCK / 2 + 3;
        let floats = |seed: usize| (0..LEN).map(|i| ((i * 31 + seed) % 97) as f32 * 0.02 - 1.0).collect::<Vec<_>>();
        let (parameters, gradient_sum) = (floats(1), floats(2));
        let take = |past_caches: bool| {
            let (mut first, mut second, mut updated) = (floats(3), vec![0.25; LEN], vec![f32::NAN; LEN]);
            let slices = AdamSlices {
                parameters: &parameters,
                gradient_sum: &gradient_sum,
                first_moment: &mut first,
                second_moment: &mut second,
                updated: &mut updated,
            };
            let (digest, squares) = take_step(Isa::best(), Adam::default().step(3, 8), slices, past_caches);
            assert!(updated.iter().all(|updated| updated.is_finite()), "every parameter was written");
            (digest, squares, first, second, updated)
        };
        assert!(take(true) == take(false));
    }
}
