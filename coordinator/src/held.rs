//! Parts of nodes that must not be in a sum yet, because the work of whoever sent them is being checked.

use std::collections::BTreeMap;

use lockstep_common::protocol::MemberId;
use lockstep_common::reduce::NodeId;

/// What is held, in the order in which it came.
#[derive(Debug)]
pub(crate) struct Held<T>(BTreeMap<MemberId, Vec<(NodeId, T)>>);

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Held<T> {
    /// From now on, what comes from this member is held.
    pub(crate) fn hold(&mut self, member: MemberId) {
        self.0.entry(member).or_default();
    }

    /// Keeps a part if its sender's parts are held; else gives it back.
    pub(crate) fn keep(&mut self, member: MemberId, node: NodeId, part: T) -> Option<T> {
        match self.0.get_mut(&member) {
            Some(held) => {
                held.push((node, part));
                None
            }
            None => Some(part),
        }
    }

    /// Holds nothing more of this member, and gives what was held.
    pub(crate) fn release(&mut self, member: MemberId) -> Vec<(NodeId, T)> {
        self.0.remove(&member).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_held_is_kept_until_it_is_released() {
        let [one, other] = [1, 2].map(|worker| MemberId { worker, incarnation: 1 });
        let mut held = Held::default();
        held.hold(one);
        assert_eq!(held.keep(other, NodeId::leaf(0), 'a'), Some('a'));
        assert_eq!(held.keep(one, NodeId::leaf(1), 'b'), None);
        assert_eq!(held.keep(one, NodeId::leaf(0), 'c'), None);
        assert_eq!(held.release(one), [(NodeId::leaf(1), 'b'), (NodeId::leaf(0), 'c')]);
        assert_eq!(held.keep(one, NodeId::leaf(2), 'd'), Some('d'));
    }
}
