//! What the driver and its workers are connected by: gRPC, or channels inside one process.

use lockstep_common::progress::Transport;
use lockstep_common::protocol::{FromWorker, JoinRequest, MemberId, Refusal, ToWorker, Welcome, WorkerChoice};
use tokio::sync::{mpsc, oneshot};

/// Messages from all workers that may wait for the driver. Gradient parts are the large ones: 64 of 1 MiB.
pub const INBOX_DEPTH: usize = 64;

/// The way to one worker.
pub trait Link: Send {
    /// Hands a message over for delivery; never waits.
    ///
    /// # Errors
    /// [`LinkError`] when the worker cannot be reached any more.
    fn send(&mut self, message: ToWorker) -> Result<(), LinkError>;

    /// How tensors travel: over gRPC new parameters go to the worker chunk by chunk as they are made, else as a whole. A
    /// worker that turns out to share memory does so from then on.
    fn transport(&self) -> Transport;
}

/// Why a message could not be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The worker reads more slowly than it is written to.
    #[error("it does not keep up: {0} messages are waiting for it")]
    Full(usize),
    /// The connection is gone.
    #[error("the connection is closed")]
    Closed,
}

/// What reaches the driver.
pub enum Inbound {
    /// A worker asks to be admitted.
    Join {
        /// Who asks.
        request: JoinRequest,
        /// The way to it, used once it is admitted.
        link: Box<dyn Link>,
        /// Where the answer goes.
        answer: oneshot::Sender<Result<Welcome, Refusal>>,
    },
    /// A member says something.
    From(MemberId, FromWorker),
    /// A member's connection is gone.
    Closed(MemberId, String),
    /// An operator wants the run to end.
    Stop(String),
    /// An operator wants a worker to leave.
    Drain {
        /// Which one.
        worker: WorkerChoice,
        /// Where the answer goes.
        answer: oneshot::Sender<Result<MemberId, DrainError>>,
    },
}

/// Why no worker is asked to leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    /// There is none such.
    #[error("there is no worker {0}; `lockstep monitor --workers` lists them")]
    Unknown(WorkerChoice),
    /// There are several.
    #[error("{} workers are called {name:?}: {}; name one of these", members.len(), listed(members))]
    Ambiguous {
        /// The name.
        name: String,
        /// Who has it.
        members: Vec<MemberId>,
    },
}

fn listed(members: &[MemberId]) -> String {
    members.iter().map(MemberId::to_string).collect::<Vec<_>>().join(", ")
}

/// Where connections hand in what reaches the driver.
pub type Inbox = mpsc::Sender<Inbound>;

/// A link to a worker in this process. Nothing is copied. The protocol bounds what can be under way: an assignment and
/// a version of the parameters for each piece of work.
pub struct InProcessLink(mpsc::UnboundedSender<ToWorker>);

impl InProcessLink {
    /// A link, and where the worker reads from it.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<ToWorker>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }
}

impl Link for InProcessLink {
    fn send(&mut self, message: ToWorker) -> Result<(), LinkError> {
        self.0.send(message).map_err(|_| LinkError::Closed)
    }

    fn transport(&self) -> Transport {
        Transport::InProcess
    }
}
