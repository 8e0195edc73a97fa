//! Refusals as gRPC statuses, and back: the one place that knows which code means what.
//!
//! The code tells a worker what to do ([`verdict`]), the details carry the typed reason, the message is for people.
//! The details are a `google.rpc.Status`, as gRPC libraries of other languages expect.

use lockstep_common::protocol::{self, MemberId, ShardRef};
use prost::Message;
use tonic::{Code, Status};

use crate::convert::{At, clip, digest, digest_bytes, required, text};
use crate::limits::MAX_REFUSAL_TEXT_BYTES;
use crate::v1::{self, refusal::Reason};
use crate::wire_error::WireError;

/// Why a coordinator refuses a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The worker is not admitted.
    #[error(transparent)]
    NotAdmitted(#[from] protocol::Refusal),
    /// The sender is not, or no longer, a member.
    #[error("{member} is not a member of the run, or no longer; it may join again")]
    NotAMember {
        /// Who the sender says it is.
        member: MemberId,
    },
    /// The run has no such shard.
    #[error("there is no {shard}: the run has {shards} shards")]
    NoSuchShard {
        /// What was asked for.
        shard: ShardRef,
        /// How many there are.
        shards: u32,
    },
    /// A message that means nothing.
    #[error("malformed message: {problem}")]
    Malformed {
        /// The [`WireError`], as text.
        problem: String,
    },
    /// A message that was damaged on its way.
    #[error("damaged message: {problem}")]
    Corrupted {
        /// The [`WireError`], as text.
        problem: String,
    },
    /// The coordinator is going down, and may come back.
    #[error("the coordinator is shutting down; it may come back")]
    Shutdown,
}

impl From<WireError> for Refusal {
    fn from(error: WireError) -> Self {
        let problem = error.to_string();
        if error.is_damage() { Self::Corrupted { problem } } else { Self::Malformed { problem } }
    }
}

/// A malformed message ends the call with the status of its refusal: `SessionUp::try_from(request)?`.
impl From<WireError> for Status {
    fn from(error: WireError) -> Self {
        Refusal::from(error).into()
    }
}

impl Refusal {
    /// The code under which the refusal travels.
    pub fn code(&self) -> Code {
        match self {
            Self::NotAdmitted(
                protocol::Refusal::Version { .. }
                | protocol::Refusal::Fingerprint { .. }
                | protocol::Refusal::Barred { .. }
                | protocol::Refusal::Finished { .. },
            ) => Code::FailedPrecondition,
            Self::NotAdmitted(protocol::Refusal::Full { .. }) => Code::ResourceExhausted,
            Self::NotAMember { .. } => Code::Aborted,
            Self::NoSuchShard { .. } | Self::Malformed { .. } => Code::InvalidArgument,
            Self::Corrupted { .. } => Code::DataLoss,
            Self::Shutdown => Code::Unavailable,
        }
    }

    /// The refusal that a status carries; `None` for faults of the transport and of other servers.
    pub fn of(status: &Status) -> Option<Self> {
        let details = RpcStatus::decode(status.details()).ok()?.details;
        let any = details.into_iter().find(|any| any.type_url == REFUSAL_TYPE)?;
        v1::Refusal::decode(&any.value[..]).ok()?.try_into().ok()
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = refusal.code();
        let message = clip(refusal.to_string(), MAX_REFUSAL_TEXT_BYTES);
        let any = Any { type_url: REFUSAL_TYPE.to_owned(), value: v1::Refusal::from(refusal).encode_to_vec() };
        let details = RpcStatus { code: code.into(), message: message.clone(), details: vec![any] };
        Self::with_details(code, message, details.encode_to_vec().into())
    }
}

/// What a failed call means for a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The coordinator is not there now: try again after a while.
    RetryLater,
    /// The session is void, the coordinator is well: join again.
    JoinAgain,
    /// Trying again cannot help.
    Never,
}

/// What `status`, of whatever origin, means for a worker.
pub fn verdict(status: &Status) -> Verdict {
    match status.code() {
        // What lost connections, timeouts and resets end in; tonic says `Unknown` or `Internal` for some of them.
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::ResourceExhausted
        | Code::Unknown
        | Code::Internal => Verdict::RetryLater,
        Code::Aborted | Code::DataLoss => Verdict::JoinAgain,
        Code::Ok
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::Unauthenticated
        | Code::PermissionDenied
        | Code::Unimplemented
        | Code::NotFound
        | Code::AlreadyExists
        | Code::OutOfRange => Verdict::Never,
    }
}

/// A status for people: the refusal, or the message (the code's meaning if there is none) and what first caused it.
pub fn describe(status: &Status) -> String {
    if let Some(refusal) = Refusal::of(status) {
        return refusal.to_string();
    }
    let message = status.message();
    let mut words = if message.is_empty() { status.code().description() } else { message }.to_owned();
    let mut causes = std::iter::successors(std::error::Error::source(status), |error| error.source());
    // The layers between say the same again, with their types' names.
    if let Some(first) = causes.by_ref().last().map(ToString::to_string)
        && !words.contains(&first)
    {
        words.push_str(": ");
        words.push_str(&first);
    }
    text(clip(words, MAX_REFUSAL_TEXT_BYTES)).unwrap_or_default()
}

impl From<Refusal> for v1::Refusal {
    fn from(refusal: Refusal) -> Self {
        let short = |text| clip(text, MAX_REFUSAL_TEXT_BYTES);
        let reason = match refusal {
            Refusal::NotAdmitted(refusal) => not_admitted(refusal),
            Refusal::NotAMember { member } => Reason::NotAMember(v1::NotAMember { member: Some(member.into()) }),
            Refusal::NoSuchShard { shard, shards } => {
                Reason::NoSuchShard(v1::NoSuchShard { shard: Some(shard.into()), shards })
            }
            Refusal::Malformed { problem } => Reason::Malformed(v1::Malformed { problem: short(problem) }),
            Refusal::Corrupted { problem } => Reason::Corrupted(v1::Corrupted { problem: short(problem) }),
            Refusal::Shutdown => Reason::Shutdown(v1::Shutdown {}),
        };
        Self { reason: Some(reason) }
    }
}

impl TryFrom<v1::Refusal> for Refusal {
    type Error = WireError;

    fn try_from(refusal: v1::Refusal) -> Result<Self, WireError> {
        const M: &str = "Refusal";
        Ok(match refusal.reason.ok_or_else(|| WireError::missing(M, "reason"))? {
            Reason::VersionMismatch(v1::VersionMismatch { run, worker }) => {
                let run = text(run).at(M, "version_mismatch.run")?;
                protocol::Refusal::Version { run, worker: text(worker).at(M, "version_mismatch.worker")? }.into()
            }
            Reason::FingerprintMismatch(v1::FingerprintMismatch { run, worker }) => {
                let run = digest(&run).at(M, "fingerprint_mismatch.run")?;
                let worker = digest(&worker).at(M, "fingerprint_mismatch.worker")?;
                protocol::Refusal::Fingerprint { run, worker }.into()
            }
            Reason::Barred(barred) => {
                protocol::Refusal::Barred { reason: text(barred.reason).at(M, "barred.reason")? }.into()
            }
            Reason::RunFinished(finished) => {
                protocol::Refusal::Finished { reason: text(finished.reason).at(M, "run_finished.reason")? }.into()
            }
            Reason::RunFull(v1::RunFull { members }) => protocol::Refusal::Full { members }.into(),
            Reason::NotAMember(stranger) => {
                Self::NotAMember { member: required(M, "not_a_member.member", stranger.member)? }
            }
            Reason::NoSuchShard(v1::NoSuchShard { shard, shards }) => {
                Self::NoSuchShard { shard: required(M, "no_such_shard.shard", shard)?, shards }
            }
            Reason::Malformed(malformed) => {
                Self::Malformed { problem: text(malformed.problem).at(M, "malformed.problem")? }
            }
            Reason::Corrupted(corrupted) => {
                Self::Corrupted { problem: text(corrupted.problem).at(M, "corrupted.problem")? }
            }
            Reason::Shutdown(v1::Shutdown {}) => Self::Shutdown,
        })
    }
}

fn not_admitted(refusal: protocol::Refusal) -> Reason {
    match refusal {
        protocol::Refusal::Version { run, worker } => {
            let half = |text| clip(text, MAX_REFUSAL_TEXT_BYTES / 2);
            Reason::VersionMismatch(v1::VersionMismatch { run: half(run), worker: half(worker) })
        }
        protocol::Refusal::Fingerprint { run, worker } => Reason::FingerprintMismatch(v1::FingerprintMismatch {
            run: digest_bytes(run),
            worker: digest_bytes(worker),
        }),
        protocol::Refusal::Barred { reason } => {
            Reason::Barred(v1::Barred { reason: clip(reason, MAX_REFUSAL_TEXT_BYTES) })
        }
        protocol::Refusal::Full { members } => Reason::RunFull(v1::RunFull { members }),
        protocol::Refusal::Finished { reason } => {
            Reason::RunFinished(v1::RunFinished { reason: clip(reason, MAX_REFUSAL_TEXT_BYTES) })
        }
    }
}

const REFUSAL_TYPE: &str = "type.googleapis.com/lockstep.v1.Refusal";

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}
