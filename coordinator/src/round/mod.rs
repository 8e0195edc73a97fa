//! Decisions, and nothing else: who is a member, who computes what, when a round is complete.
//!
//! This module has no clock, no IO and no async code. Events go in, effects come out, and the time is an argument; the
//! [driver](crate::driver) performs the effects.

mod arrivals;
mod assign;
mod check;
mod checkpoint;
mod commit;
mod edge;
mod event;
mod hedge;
mod machine;
mod membership;
mod non_finite;
mod pace;
mod work;

pub use assign::Ownership;
pub use event::{CheckpointId, Effect, Event, Occasion, Outcome, Rejected, Step, Task, ToMember};
pub use machine::{Machine, MachineConfig};
pub use membership::{ConnectionId, Member, MemberState};
pub use pace::Pace;
