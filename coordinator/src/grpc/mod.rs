//! The coordinator's gRPC server: workers, monitors, operators, health and reflection on one port.

mod accept;
mod access;
mod control_service;
mod credentials;
mod monitor_service;
mod quota;
mod sharing;
mod worker_service;

use std::sync::Arc;

use lockstep_common::placement::PlacedData;
use lockstep_common::protocol::Job;
use lockstep_common::shared_memory::Region;
use lockstep_proto::limits::MAX_HEALTH_MESSAGE_BYTES;
use lockstep_proto::{FILE_DESCRIPTOR_SET, transport};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::error;

use crate::link::Inbox;
use crate::monitor::Hub;
use access::Gate;
use control_service::Controlling;
pub use credentials::{CredentialError, CredentialSources, Credentials, TlsFiles, TokenSource, TokenSources};
use monitor_service::Monitoring;
use quota::Most;
pub(crate) use quota::Origin;
use worker_service::Workers;

/// What the server serves.
pub struct Served {
    /// Where workers' messages go.
    pub inbox: Inbox,
    /// The run, as workers are told of it.
    pub job: Job,
    /// Its data.
    pub data: Arc<PlacedData>,
    /// Its public state.
    pub hub: Arc<Hub>,
    /// Where versions of the parameters lie, if workers can read them there.
    pub region: Option<Arc<Region>>,
    /// Connections that are taken at a time.
    pub max_connections: usize,
    /// How many of them may come from one address.
    pub max_connections_per_address: usize,
}

/// A server that is running.
pub struct Server {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Server {
    /// Takes no more calls and waits for those under way, which end with the run.
    pub async fn shut_down(self) {
        // The server may have ended already.
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

/// Starts serving on `listener` whoever `credentials` let in.
pub fn serve(listener: TcpListener, served: Served, credentials: Credentials) -> Server {
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(async move {
        if let Err(error) = run(listener, served, credentials, stopped).await {
            error!("the gRPC server has ended: {error}");
        }
    });
    Server { stop, task }
}

async fn run(
    listener: TcpListener,
    served: Served,
    credentials: Credentials,
    stopped: oneshot::Receiver<()>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let Served { inbox, job, data, hub, region, max_connections, max_connections_per_address } = served;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let controlling = transport::control_server(Controlling::new(inbox.clone()));
    let workers = transport::worker_server(Workers::new(inbox, job, data, hub.clone(), region));
    let monitoring = transport::monitor_server(Monitoring::new(hub));
    let (health, health_service) = tonic_health::server::health_reporter();
    set_serving(&health, &workers).await;
    set_serving(&health, &monitoring).await;
    set_serving(&health, &controlling).await;
    let gate = Gate::new(credentials.current());
    let most = Most { total: max_connections, per_origin: max_connections_per_address };
    let connections = accept::accept(listener, most, credentials.current());
    tokio::spawn(credentials.follow());
    transport::server()
        .layer(gate)
        .add_service(workers)
        .add_service(monitoring)
        .add_service(controlling)
        .add_service(health_service.max_decoding_message_size(MAX_HEALTH_MESSAGE_BYTES))
        .add_service(reflection().build_v1()?)
        // Python's grpcio asks for the older version.
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming_shutdown(connections, async {
            let _ = stopped.await;
        })
        .await?;
    Ok(())
}

async fn set_serving<S: tonic::server::NamedService>(health: &tonic_health::server::HealthReporter, _service: &S) {
    health.set_serving::<S>().await;
}
