//! A small HTTP server for `/metrics`, and for the probes `/healthz` and `/readyz`.
//!
//! It answers GET and HEAD, one request a connection, and reads no bodies. What it says is no secret: losses, counts and
//! times, but no samples, parameters or tokens. It cannot change anything.

use std::collections::VecDeque;
use std::convert::Infallible;
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
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, warn};

use super::{MEDIA_TYPE, text};
use crate::grpc::Origin;
use crate::monitor::Hub;

/// Connections at a time: some Prometheus servers and probes.
const MAX_CONNECTIONS: usize = 64;

/// Connections at a time from one address.
const MAX_CONNECTIONS_PER_ADDRESS: usize = 8;

/// Bytes of a request's head, and of what hyper buffers: the least that it takes. Memory is bounded by 64 connections of
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
pub async fn serve(listener: TcpListener, hub: Arc<Hub>) {
    // Dropped with this future: no connection outlives the server.
    let mut connections = JoinSet::new();
    let mut served = Served::default();
    loop {
        match listener.accept().await {
            Ok((socket, remote)) => {
                while connections.try_join_next().is_some() {}
                let origin = remote.ip().into();
                served.make_room(origin);
                let hub = hub.clone();
                served.0.push_back((origin, connections.spawn(async move { connection(socket, &hub).await })));
            }
            Err(error) => {
                warn!("the metrics server cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The connections that are served, the oldest first.
#[derive(Default)]
struct Served(VecDeque<(Origin, AbortHandle)>);

impl Served {
    /// Ends the oldest connection if there are too many: of those from `origin`, or of all. A scrape takes milliseconds,
    /// so that the oldest is one that says nothing. If it were waited for, whoever reaches the port could keep it from
    /// probes, and have a supervisor kill the coordinator.
    fn make_room(&mut self, origin: Origin) {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let from_there = || self.0.iter().enumerate().filter(|(_, (other, _))| *other == origin).map(|(at, _)| at);
        let oldest = match from_there().next() {
            Some(first) if from_there().count() >= MAX_CONNECTIONS_PER_ADDRESS => first,
            _ if self.0.len() >= MAX_CONNECTIONS => 0,
            _ => return,
        };
        if let Some((_, connection)) = self.0.remove(oldest) {
            connection.abort();
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

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::net::Ipv4Addr;

    use super::*;

    /// Connections that never end by themselves, one from each of these hosts in this order, as `serve` takes them.
    /// Returns which are still served.
    async fn held(hosts: impl Iterator<Item = u32>) -> Vec<usize> {
        let (mut served, mut tasks) = (Served::default(), Vec::new());
        for host in hosts {
            let origin = std::net::IpAddr::from(Ipv4Addr::from_bits(host)).into();
            served.make_room(origin);
            let task = tokio::spawn(pending::<()>());
            served.0.push_back((origin, task.abort_handle()));
            tasks.push(task);
        }
        // Those that were ended must have ended; the others never do.
        let there =
            |task: &tokio::task::JoinHandle<()>| served.0.iter().any(|(_, connection)| connection.id() == task.id());
        let (kept, ended): (Vec<_>, Vec<_>) = tasks.into_iter().enumerate().partition(|(_, task)| there(task));
        for (_, task) in ended {
            assert!(task.await.expect_err("it never ends by itself").is_cancelled());
        }
        kept.into_iter().map(|(at, _)| at).collect()
    }

    #[tokio::test]
    async fn silent_connections_make_room_for_new_ones() {
        // Whoever opens many loses the oldest of them, and nobody else does.
        let hosts = [7].into_iter().chain([1; 20]).chain([7]);
        assert_eq!(held(hosts).await, [&[0], &(13..=21).collect::<Vec<_>>()[..]].concat());
        // From many addresses, the oldest of all goes.
        assert_eq!(held(0..100).await, (36..100).collect::<Vec<_>>());
    }
}
