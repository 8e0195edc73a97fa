//! Servers and clients with the protocol's limits set, so that no caller forgets one.

use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::{Body as HttpBody, Bytes, StdError};
use tonic::transport::{Endpoint, Server};

use crate::limits::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MAX_FAULTY_STREAMS,
    MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, MAX_MONITOR_MESSAGE_BYTES, MAX_PENDING_RESET_STREAMS,
    MAX_STREAMS_PER_CONNECTION, STREAM_WINDOW_BYTES,
};
use crate::v1::control_service_client::ControlServiceClient;
use crate::v1::control_service_server::{ControlService, ControlServiceServer};
use crate::v1::monitor_service_client::MonitorServiceClient;
use crate::v1::monitor_service_server::{MonitorService, MonitorServiceServer};
use crate::v1::worker_service_client::WorkerServiceClient;
use crate::v1::worker_service_server::{WorkerService, WorkerServiceServer};

/// A server. `serve_with_incoming` gets sockets as they are: the caller sets `TCP_NODELAY` on them.
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESET_STREAMS))
        .http2_max_local_error_reset_streams(Some(MAX_FAULTY_STREAMS))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// `endpoint` with the limits of a worker's or a monitor's connection.
pub fn configure(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .max_frame_size(MAX_FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// What workers call. Bulk calls go over a connection of their own, so that they cannot delay heartbeats.
pub fn worker_client<C>(connection: C) -> WorkerServiceClient<C>
where
    C: GrpcService<Body, Error: Into<StdError>>,
    C::ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    WorkerServiceClient::new(connection)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// What serves workers.
pub fn worker_server<S: WorkerService>(service: S) -> WorkerServiceServer<S> {
    WorkerServiceServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// What monitors call.
pub fn monitor_client<C>(connection: C) -> MonitorServiceClient<C>
where
    C: GrpcService<Body, Error: Into<StdError>>,
    C::ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    MonitorServiceClient::new(connection).max_decoding_message_size(MAX_MONITOR_MESSAGE_BYTES)
}

/// What serves monitors. Their requests are small; the responses list every member.
pub fn monitor_server<S: MonitorService>(service: S) -> MonitorServiceServer<S> {
    MonitorServiceServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MONITOR_MESSAGE_BYTES)
}

/// What operators call.
pub fn control_client<C>(connection: C) -> ControlServiceClient<C>
where
    C: GrpcService<Body, Error: Into<StdError>>,
    C::ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    ControlServiceClient::new(connection).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// What serves operators.
pub fn control_server<S: ControlService>(service: S) -> ControlServiceServer<S> {
    ControlServiceServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}
