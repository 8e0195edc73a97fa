//! Identities and positions.

use lockstep_common::protocol::{MemberId, ShardRef, Split, Work};
use lockstep_common::reduce::NodeId;

use super::{At, WireEnum, at_most, wire_enum};
use crate::limits::{MAX_LEVEL, MAX_SHARDS};
use crate::v1;
use crate::wire_error::{Fault, WireError};

wire_enum!(Split, Training, Validation);

impl From<MemberId> for v1::Member {
    fn from(member: MemberId) -> Self {
        Self { worker: member.worker, incarnation: member.incarnation }
    }
}

impl TryFrom<v1::Member> for MemberId {
    type Error = WireError;

    fn try_from(member: v1::Member) -> Result<Self, WireError> {
        nonzero(member.worker).at("Member", "worker")?;
        nonzero(member.incarnation).at("Member", "incarnation")?;
        Ok(Self { worker: member.worker, incarnation: member.incarnation })
    }
}

impl From<NodeId> for v1::Node {
    fn from(node: NodeId) -> Self {
        Self { level: node.level.into(), index: node.index }
    }
}

impl TryFrom<v1::Node> for NodeId {
    type Error = WireError;

    /// A position of the largest tree; whether it is one of the run's tree, the run's tree must say.
    fn try_from(node: v1::Node) -> Result<Self, WireError> {
        at_most(node.level.into(), MAX_LEVEL.into(), "").at("Node", "level")?;
        let last = (1u32 << (MAX_LEVEL - node.level)) - 1;
        at_most(node.index.into(), last.into(), "").at("Node", "index")?;
        Ok(Self { level: node.level as u8, index: node.index })
    }
}

impl From<Work> for v1::Work {
    fn from(work: Work) -> Self {
        let kind = match work {
            Work::Gradient { .. } => v1::WorkKind::Gradient,
            Work::Evaluation { .. } => v1::WorkKind::Evaluation,
            Work::Inspection { .. } => v1::WorkKind::Inspection,
        };
        Self { kind: kind.into(), round: work.version() }
    }
}

impl TryFrom<v1::Work> for Work {
    type Error = WireError;

    fn try_from(work: v1::Work) -> Result<Self, WireError> {
        let round = work.round;
        match v1::WorkKind::try_from(work.kind) {
            Ok(v1::WorkKind::Gradient) => Ok(Self::Gradient { round }),
            Ok(v1::WorkKind::Evaluation) => Ok(Self::Evaluation { round }),
            Ok(v1::WorkKind::Inspection) => Ok(Self::Inspection { round }),
            Ok(v1::WorkKind::Unspecified) | Err(_) => {
                Err(Fault::UnknownEnum { name: "WorkKind", value: work.kind }).at("Work", "kind")
            }
        }
    }
}

impl From<ShardRef> for v1::ShardRef {
    fn from(shard: ShardRef) -> Self {
        Self { split: v1::Split::from(shard.split).into(), shard: shard.shard }
    }
}

impl TryFrom<v1::ShardRef> for ShardRef {
    type Error = WireError;

    fn try_from(shard: v1::ShardRef) -> Result<Self, WireError> {
        at_most(shard.shard.into(), u64::from(MAX_SHARDS) - 1, "").at("ShardRef", "shard")?;
        Ok(Self { split: Split::from_wire(shard.split).at("ShardRef", "split")?, shard: shard.shard })
    }
}

pub(super) fn nonzero(value: u32) -> Result<(), Fault> {
    if value == 0 { Err(Fault::Zero) } else { Ok(()) }
}
