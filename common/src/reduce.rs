//! The reduction tree: in which order leaf gradients are added, whoever computed them.
//!
//! Addition of floats is not associative, so the sum of a round is defined by position: the leaves of all shards are
//! the lowest level of a perfect binary tree, and a node is its left child plus its right child.
//!
//! A run may round every node, leaves and root included, to bfloat16, so that half as much has to travel. That is done to
//! each node by itself, wherever it is computed; so the bits are the same for any number of workers here, too.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::kernel::{Isa, Precision, bf16, elementwise};

/// A position in the reduction tree: level 0 holds the leaves, the root is the one node of the highest level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId {
    /// Height above the leaves.
    pub level: u8,
    /// Position in the level, from the left.
    pub index: u32,
}

impl NodeId {
    /// The leaf of a shard.
    pub fn leaf(index: u32) -> Self {
        Self { level: 0, index }
    }

    /// The shards whose leaves the node sums.
    pub fn leaves(self) -> Range<u32> {
        let width = 1u32 << self.level;
        self.index * width..(self.index + 1) * width
    }

    /// The node that sums this one and its sibling.
    pub fn parent(self) -> Self {
        Self { level: self.level + 1, index: self.index / 2 }
    }

    /// The other child of the parent.
    pub fn sibling(self) -> Self {
        Self { level: self.level, index: self.index ^ 1 }
    }

    /// Whether all leaves of this node are leaves of `other`.
    pub fn lies_under(self, other: Self) -> bool {
        self.level <= other.level && self.index >> (other.level - self.level) == other.index
    }

    /// Whether the node is the left one of its parent's children.
    pub fn is_left(self) -> bool {
        self.index.is_multiple_of(2)
    }

    /// The children, left and right; `None` for a leaf.
    pub fn children(self) -> Option<[Self; 2]> {
        let level = self.level.checked_sub(1)?;
        Some([Self { level, index: self.index * 2 }, Self { level, index: self.index * 2 + 1 }])
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {})", self.level, self.index)
    }
}

/// The shape of a run's reduction tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    levels: u8,
}

impl Tree {
    /// The tree over `shards` leaves, or `None` when `shards` is no power of two or above 65,536.
    pub fn over(shards: u32) -> Option<Self> {
        (shards.is_power_of_two() && shards <= 1 << 16).then(|| Self { levels: shards.trailing_zeros() as u8 })
    }

    /// Number of leaves.
    pub fn shards(self) -> u32 {
        1 << self.levels
    }

    /// The node that sums all leaves.
    pub fn root(self) -> NodeId {
        NodeId { level: self.levels, index: 0 }
    }

    /// Whether `node` is a position of this tree.
    pub fn contains(self, node: NodeId) -> bool {
        node.level <= self.levels && node.index < 1 << (self.levels - node.level)
    }

    /// The fewest nodes that cover exactly the leaves in `leaves`, from left to right.
    pub fn cover(self, leaves: Range<u32>) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        let mut start = leaves.start;
        let end = leaves.end.min(self.shards());
        while start < end {
            let aligned = if start == 0 { self.levels } else { start.trailing_zeros() as u8 };
            let fitting = (end - start).ilog2() as u8;
            let level = aligned.min(fitting);
            nodes.push(NodeId { level, index: start >> level });
            start += 1 << level;
        }
        nodes
    }

    /// The fewest nodes that cover exactly the given leaves, which must be ascending.
    pub fn cover_set(self, leaves: &[u32]) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        for run in leaves.chunk_by(|a, b| a + 1 == *b) {
            nodes.extend(self.cover(run[0]..run[run.len() - 1] + 1));
        }
        nodes
    }
}

/// How the gradients of nodes are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSums {
    /// On which instruction set: a matter of speed.
    pub isa: Isa,
    /// What they are rounded to.
    pub precision: Precision,
}

/// `left[i] += right[i]`: the gradient of a node from those of its children, rounded to what nodes are rounded to.
pub fn add_nodes(sums: NodeSums, left: &mut [f32], right: &[f32]) {
    match sums.precision {
        Precision::F32 => elementwise::add(sums.isa, left, right),
        Precision::Bf16 => bf16::add_rounded(sums.isa, left, right),
    }
}

/// A sum in the making: nodes arrive in any order, from whoever computed them, and meet by position.
///
/// `T` is what is summed; [`Reduction::insert`] is given the function that adds a right sibling to a left one.
#[derive(Clone, Debug)]
pub struct Reduction<T> {
    tree: Tree,
    /// Subtree sums that wait for their sibling. No node here is an ancestor of another one.
    waiting: Vec<(NodeId, T)>,
}

/// What became of an inserted node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is part of the sum now.
    Accepted,
    /// Its leaves were there already; the bits are the same, so it is dropped.
    Duplicate,
}

impl<T> Reduction<T> {
    /// An empty sum.
    pub fn new(tree: Tree) -> Self {
        Self { tree, waiting: Vec::new() }
    }

    /// Adds the value of `node`, which must be a position of the tree. Two nodes are either disjoint or one lies under
    /// the other: a node under one that is there already is dropped, and nodes under the new one give way to it.
    pub fn insert(&mut self, node: NodeId, value: T, mut add: impl FnMut(T, T) -> T) -> Inserted {
        debug_assert!(self.tree.contains(node), "{node} is no node of the tree");
        if self.covers(node) {
            return Inserted::Duplicate;
        }
        self.waiting.retain(|(other, _)| !other.lies_under(node));
        let (mut node, mut value) = (node, value);
        while let Some(at) = self.waiting.iter().position(|(other, _)| *other == node.sibling()) {
            let (_, other) = self.waiting.swap_remove(at);
            value = if node.is_left() { add(value, other) } else { add(other, value) };
            node = node.parent();
        }
        self.waiting.push((node, value));
        Inserted::Accepted
    }

    /// Whether all leaves under `node` are part of the sum.
    pub fn covers(&self, node: NodeId) -> bool {
        self.waiting.iter().any(|(other, _)| node.lies_under(*other))
    }

    /// The leaves that no inserted node covers, ascending.
    pub fn missing(&self) -> Vec<u32> {
        (0..self.tree.shards()).filter(|&leaf| !self.covers(NodeId::leaf(leaf))).collect()
    }

    /// The value of the root, once every leaf is there.
    pub fn root(&self) -> Option<&T> {
        match &self.waiting[..] {
            [(node, value)] if *node == self.tree.root() => Some(value),
            _ => None,
        }
    }

    /// Takes the value of the root out, once every leaf is there; the sum is empty afterwards.
    pub fn take_root(&mut self) -> Option<T> {
        self.root()?;
        self.waiting.pop().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_powers_of_two_make_a_tree() {
        assert_eq!([0, 3, 1 << 17].map(Tree::over), [None; 3]);
        assert_eq!(Tree::over(1).unwrap().root(), NodeId { level: 0, index: 0 });
    }

    #[test]
    fn covers_are_exact_and_small() {
        let tree = Tree::over(16).unwrap();
        assert_eq!(tree.cover(0..16), [tree.root()]);
        assert_eq!(tree.cover(0..0), []);
        for start in 0..16 {
            for end in start + 1..=16 {
                let nodes = tree.cover(start..end);
                let leaves: Vec<u32> = nodes.iter().flat_map(|node| node.leaves()).collect();
                assert_eq!(leaves, (start..end).collect::<Vec<u32>>());
                assert!(nodes.len() <= 6, "{start}..{end} needs {} nodes", nodes.len());
            }
        }
        assert_eq!(tree.cover_set(&[1, 4, 5, 6, 7, 9]).len(), 3);
    }

    /// Sums by position as nested text, so that the order of every addition shows.
    fn nested(left: String, right: String) -> String {
        format!("({left}+{right})")
    }

    fn expected(node: NodeId) -> String {
        match node.children() {
            None => node.index.to_string(),
            Some([left, right]) => nested(expected(left), expected(right)),
        }
    }

    proptest! {
        #[test]
        fn the_order_of_additions_does_not_depend_on_the_order_of_arrival(
            levels in 0u32..5, cuts in proptest::collection::vec(0u32..16, 0..6), order in any::<u64>()
        ) {
            let tree = Tree::over(1 << levels).unwrap();
            // Any split of the leaves among workers, each of which sends its cover; then some of it twice.
            let mut bounds: Vec<u32> = cuts.iter().map(|cut| cut % (tree.shards() + 1)).chain([0, tree.shards()]).collect();
            bounds.sort_unstable();
            let mut nodes: Vec<NodeId> = bounds.windows(2).flat_map(|pair| tree.cover(pair[0]..pair[1])).collect();
            nodes.extend(nodes.clone());
            // A larger node that covers some of the others, and smaller ones under some of them.
            nodes.extend(tree.cover(0..tree.shards().div_ceil(2)));
            nodes.extend((0..tree.shards()).step_by(3).map(NodeId::leaf));
            crate::rng::Stream::new(order, crate::rng::Purpose::SelfTest, 0, 0).shuffle(&mut nodes);
            let mut reduction = Reduction::new(tree);
            for node in nodes {
                reduction.insert(node, expected(node), nested);
            }
            prop_assert_eq!(reduction.root(), Some(&expected(tree.root())));
            prop_assert!(reduction.missing().is_empty());
        }
    }
}
