//! What operators ask for.

use lockstep_common::protocol::WorkerChoice;

use super::{At, clip, required, text};
use crate::limits::MAX_TEXT_BYTES;
use crate::v1::{self, drain_worker_request::Worker};
use crate::wire_error::WireError;

/// The reason in a request to stop; a stock one if it is empty.
///
/// # Errors
/// When it is too long.
pub fn stop_reason(request: v1::StopRunRequest) -> Result<String, WireError> {
    let reason = text(request.reason).at("StopRunRequest", "reason")?;
    Ok(if reason.trim().is_empty() { "an operator asked for it".to_owned() } else { reason })
}

impl From<WorkerChoice> for v1::DrainWorkerRequest {
    fn from(choice: WorkerChoice) -> Self {
        let worker = match choice {
            WorkerChoice::Member(member) => Worker::Member(member.into()),
            WorkerChoice::Name(name) => Worker::Name(clip(name, MAX_TEXT_BYTES)),
        };
        Self { worker: Some(worker) }
    }
}

impl TryFrom<v1::DrainWorkerRequest> for WorkerChoice {
    type Error = WireError;

    fn try_from(request: v1::DrainWorkerRequest) -> Result<Self, WireError> {
        const M: &str = "DrainWorkerRequest";
        Ok(match request.worker.ok_or_else(|| WireError::missing(M, "worker"))? {
            Worker::Member(member) => Self::Member(required(M, "member", Some(member))?),
            Worker::Name(name) => Self::Name(text(name).at(M, "name")?),
        })
    }
}

#[cfg(test)]
mod tests {
    use lockstep_common::protocol::MemberId;

    use super::*;

    #[test]
    fn choices_arrive_as_they_were_sent() {
        let member = MemberId { worker: 3, incarnation: 2 };
        for choice in [WorkerChoice::Member(member), WorkerChoice::Name("left rack".to_owned())] {
            assert_eq!(v1::DrainWorkerRequest::from(choice.clone()).try_into(), Ok(choice));
        }
        assert!(WorkerChoice::try_from(v1::DrainWorkerRequest { worker: None }).is_err());
        let nobody = v1::Member { worker: 0, incarnation: 1 };
        assert!(WorkerChoice::try_from(v1::DrainWorkerRequest { worker: Some(Worker::Member(nobody)) }).is_err());
    }

    #[test]
    fn a_stop_has_a_reason() {
        let reason = |reason: String| stop_reason(v1::StopRunRequest { reason });
        assert_eq!(reason("maintenance".to_owned()).unwrap(), "maintenance");
        assert!(!reason(" ".to_owned()).unwrap().trim().is_empty());
        assert!(reason("x".repeat(MAX_TEXT_BYTES + 1)).is_err());
    }
}
