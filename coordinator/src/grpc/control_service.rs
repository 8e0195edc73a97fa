//! What operators call.

use lockstep_common::protocol::WorkerChoice;
use lockstep_proto::convert::stop_reason;
use lockstep_proto::v1::control_service_server::ControlService;
use lockstep_proto::{status, v1};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};
use tracing::info;

use crate::link::{DrainError, Inbound, Inbox};

/// The service.
pub(super) struct Controlling {
    inbox: Inbox,
}

impl Controlling {
    pub(super) fn new(inbox: Inbox) -> Self {
        Self { inbox }
    }

    async fn ask(&self, message: Inbound) -> Result<(), Status> {
        self.inbox.send(message).await.map_err(|_| status::Refusal::Shutdown.into())
    }
}

#[tonic::async_trait]
impl ControlService for Controlling {
    async fn stop_run(&self, request: Request<v1::StopRunRequest>) -> Result<Response<v1::StopRunResponse>, Status> {
        let reason = stop_reason(request.into_inner())?;
        info!("an operator stops the run: {reason}");
        self.ask(Inbound::Stop(reason)).await?;
        Ok(Response::new(v1::StopRunResponse {}))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let worker = WorkerChoice::try_from(request.into_inner())?;
        let (answer, answered) = oneshot::channel();
        self.ask(Inbound::Drain { worker, answer }).await?;
        let member = answered.await.map_err(|_| status::Refusal::Shutdown)?.map_err(|error| match &error {
            DrainError::Unknown(_) => Status::not_found(error.to_string()),
            DrainError::Ambiguous { .. } => Status::failed_precondition(error.to_string()),
        })?;
        info!("an operator asks {member} to leave");
        Ok(Response::new(v1::DrainWorkerResponse { member: Some(member.into()) }))
    }
}
