//! The control stream.

use lockstep_common::protocol::{FromWorker, Job, JoinRequest, KeepList, ShardRef, ToWorker, Welcome};

use super::assignment::AssignmentReader;
use super::identity::nonzero;
use super::{At, at_most, each, required, text};
use crate::v1::{self, session_request, session_response};
use crate::wire_error::{Fault, WireError};

/// A session request as the coordinator sees it.
#[derive(Clone, Debug)]
pub enum SessionUp {
    /// A request to become a member.
    Join(JoinRequest),
    /// Anything later.
    Message(FromWorker),
}

impl SessionUp {
    /// The join, which must come first.
    ///
    /// # Errors
    /// [`Fault::OutOfOrder`] when it is anything else.
    pub fn join(self) -> Result<JoinRequest, WireError> {
        match self {
            Self::Join(join) => Ok(join),
            Self::Message(_) => Err(out_of_order("SessionRequest", "a join", "another message")),
        }
    }

    /// The message of a member, which must not be a second join.
    ///
    /// # Errors
    /// [`Fault::OutOfOrder`] when it is a join.
    pub fn message(self) -> Result<FromWorker, WireError> {
        match self {
            Self::Message(message) => Ok(message),
            Self::Join(_) => Err(out_of_order("SessionRequest", "a member's message", "a second join")),
        }
    }
}

impl From<JoinRequest> for v1::SessionRequest {
    fn from(join: JoinRequest) -> Self {
        Self { message: Some(session_request::Message::Join(join.into())) }
    }
}

impl TryFrom<v1::SessionRequest> for SessionUp {
    type Error = WireError;

    fn try_from(request: v1::SessionRequest) -> Result<Self, WireError> {
        use session_request::Message as Wire;
        Ok(Self::Message(match request.message.ok_or_else(|| WireError::missing("SessionRequest", "message"))? {
            Wire::Join(join) => return join.try_into().map(Self::Join),
            Wire::Heartbeat(v1::Heartbeat {}) => FromWorker::Heartbeat,
            Wire::Cached(cached) => {
                nonzero(cached.list).at("Cached", "list")?;
                FromWorker::Cached { list: cached.list, shard: required("Cached", "shard", cached.shard)? }
            }
            Wire::Drain(v1::Drain {}) => FromWorker::Drain,
            Wire::Failed(failed) => FromWorker::Failed { reason: text(failed.reason).at("Failed", "reason")? },
        }))
    }
}

/// A session response as the worker sees it.
#[derive(Clone, Debug)]
pub enum SessionDown {
    /// The worker is admitted.
    Welcome(Welcome),
    /// Anything later: `Keep`, `Assign`, `Evicted` or `Finished`.
    Message(ToWorker),
}

impl From<&Welcome> for v1::SessionResponse {
    fn from(welcome: &Welcome) -> Self {
        Self { message: Some(session_response::Message::Welcome(welcome.into())) }
    }
}

/// Reads a session's responses: the welcome first, then messages, each checked against the job; pieces of an
/// assignment are put together.
#[derive(Debug, Default)]
pub struct SessionReader {
    admitted: Option<Admitted>,
}

#[derive(Debug)]
struct Admitted {
    shards: u32,
    assignment: AssignmentReader,
}

impl Admitted {
    fn to(job: &Job) -> Self {
        Self { shards: job.schedule.tree.shards(), assignment: AssignmentReader::new(job) }
    }
}

impl SessionReader {
    /// A reader of a new session.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next response in; gives nothing if more of an assignment must come. The reader is of no use after an
    /// error.
    ///
    /// # Errors
    /// [`WireError`] when the response is malformed, comes out of order, or contradicts the job.
    pub fn read(&mut self, response: v1::SessionResponse) -> Result<Option<SessionDown>, WireError> {
        use session_response::Message as Wire;
        const M: &str = "SessionResponse";
        let message = response.message.ok_or_else(|| WireError::missing(M, "message"))?;
        let Some(admitted) = &mut self.admitted else {
            // A run may end, or evict the worker, before it was welcomed.
            return match message {
                Wire::Welcome(welcome) => {
                    let welcome = Welcome::try_from(welcome)?;
                    self.admitted = Some(Admitted::to(&welcome.job));
                    Ok(Some(SessionDown::Welcome(welcome)))
                }
                Wire::Evicted(evicted) => Ok(Some(SessionDown::Message(evicted.try_into()?))),
                Wire::Finished(finished) => Ok(Some(SessionDown::Message(finished.try_into()?))),
                Wire::Keep(_) => Err(out_of_order(M, "a welcome", "shards to keep")),
                Wire::Assign(_) => Err(out_of_order(M, "a welcome", "an assignment")),
            };
        };
        Ok(Some(SessionDown::Message(match message {
            Wire::Welcome(_) => return Err(out_of_order(M, "a member's message", "a second welcome")),
            Wire::Keep(keep) => ToWorker::Keep(keep_of(keep, admitted.shards)?),
            Wire::Assign(piece) => match admitted.assignment.read(piece)? {
                Some(assignment) => ToWorker::Assign(assignment),
                None => return Ok(None),
            },
            Wire::Evicted(evicted) => evicted.try_into()?,
            Wire::Finished(finished) => finished.try_into()?,
        })))
    }
}

fn keep_of(keep: v1::Keep, shards: u32) -> Result<KeepList, WireError> {
    nonzero(keep.list).at("Keep", "list")?;
    let kept: Vec<ShardRef> = each("Keep", "shards", keep.shards)?;
    for (i, shard) in kept.iter().enumerate() {
        at_most(shard.shard.into(), u64::from(shards) - 1, "").at("Keep", &format!("shards[{i}].shard"))?;
    }
    Ok(KeepList { list: keep.list, shards: kept })
}

impl TryFrom<v1::Evicted> for ToWorker {
    type Error = WireError;

    fn try_from(evicted: v1::Evicted) -> Result<Self, WireError> {
        Ok(Self::Evicted { reason: text(evicted.reason).at("Evicted", "reason")? })
    }
}

impl TryFrom<v1::Finished> for ToWorker {
    type Error = WireError;

    fn try_from(finished: v1::Finished) -> Result<Self, WireError> {
        Ok(Self::Finished { reason: text(finished.reason).at("Finished", "reason")? })
    }
}

pub(super) fn out_of_order(message: &'static str, expected: &'static str, got: &'static str) -> WireError {
    WireError::new(message, "message", Fault::OutOfOrder { expected, got })
}
