//! A small HTTP server for `/metrics`, and for the probes `/healthz` and `/readyz`.
//!
//! It answers GET and HEAD, one request a connection, and reads no bodies. What it says is no secret: losses, counts and
//! times, but no samples, parameters or tokens. It cannot change anything.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use lockstep_common::progress::RunState;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::{MEDIA_TYPE, text};
use crate::monitor::Hub;

/// Connections at a time: some Prometheus servers and probes. Others wait in the system's queue.
const MAX_CONNECTIONS: usize = 16;

/// Bytes of a request's head, and of what hyper buffers: the least that it takes. Memory is bounded by 16 connections of
/// 8 KiB and a page of 8 KiB each.
const MAX_HEAD_BYTES: usize = 8 << 10;

/// Header fields of a request; Prometheus and browsers send about ten.
const MAX_HEADERS: usize = 32;

/// A connection ends after this time, whatever it does: a scrape takes milliseconds, and Prometheus gives up after 10 s.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A driver that has been silent for so long is stuck: it gives a sign of life every 50 ms, and the longest that it may
/// wait for is a slow disk.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// A pause after an error of the listener, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the run's metrics on `listener`, until the future is dropped.
pub fn serve(listener: TcpListener, hub: Arc<Hub>) -> impl Future<Output = ()> + Send + 'static {
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    async move {
        // Dropped with this future: no connection outlives the server.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            // It is never closed.
            let Ok(permit) = free.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((socket, _)) => {
                    while connections.try_join_next().is_some() {}
                    let hub = hub.clone();
                    connections.spawn(async move {
                        connection(socket, &hub).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    warn!("the metrics server cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn connection(socket: TcpStream, hub: &Hub) {
    let service = service_fn(|request| async move { Ok::<_, Infallible>(answer(&request, hub)) });
    let served = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(socket), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection to the metrics server failed: {error}"),
        Err(_) => debug!("a connection to the metrics server was too slow"),
    }
}

fn answer(request: &Request<Incoming>, hub: &Hub) -> Response<Full<Bytes>> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => {
            let mut response = Response::new(Full::from(text(hub)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
            response
        }
        "/healthz" => verdict(healthy(hub)),
        "/readyz" => verdict(healthy(hub).and_then(|()| ready(hub))),
        _ => plain(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz"),
    }
}

/// Whether the coordinator does its work, or has done it.
fn healthy(hub: &Hub) -> Result<(), String> {
    let silent = hub.driver_silent_for();
    if silent < STUCK_AFTER || matches!(hub.status().state, RunState::Finished { .. }) {
        return Ok(());
    }
    Err(format!("the driver has given no sign of life for {} s", silent.as_secs()))
}

/// Whether workers can join.
fn ready(hub: &Hub) -> Result<(), String> {
    match hub.status().state {
        RunState::Finished { reason } => Err(format!("the run has ended: {reason}")),
        _ => Ok(()),
    }
}

fn verdict(verdict: Result<(), String>) -> Response<Full<Bytes>> {
    match verdict {
        Ok(()) => plain(StatusCode::OK, "ok"),
        Err(reason) => plain(StatusCode::SERVICE_UNAVAILABLE, &reason),
    }
}

fn plain(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{line}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
