//! Workers on this machine: one inside the process, or several processes.

use std::process::Stdio;
use std::sync::Arc;

use anyhow::Context;
use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::placement::PlacedData;
use lockstep_common::protocol::{FromWorker, JoinRequest};
use lockstep_coordinator::link::{InProcessLink, Inbound, Inbox};
use lockstep_proto::token::Token;
use lockstep_worker::engine::Handover;
use lockstep_worker::session::{self, Compute, Leave, Outgoing, SessionEnd, ShardSource, Transport};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::connect::JOIN_TOKEN;

/// Joins as a worker inside this process and computes until the run ends.
pub(crate) async fn in_process_worker(inbox: Inbox, data: Arc<PlacedData>, compute: Compute) -> anyhow::Result<()> {
    let (link, incoming) = InProcessLink::new();
    let (answer, answered) = oneshot::channel();
    let request = JoinRequest {
        process: u64::from(std::process::id()),
        name: format!("in process, {} threads", compute.threads),
        version: lockstep_worker::VERSION.to_owned(),
        fingerprints: Fingerprints::of(compute.isa),
        threads: compute.threads as u32,
        isa: compute.isa.name().to_owned(),
    };
    let join = Inbound::Join { request, link: Box::new(link), answer };
    inbox.send(join).await.ok().context("the coordinator has ended")?;
    let welcome = answered.await.context("the coordinator has ended")??;
    let member = welcome.member;
    let (outgoing, mut messages) = mpsc::channel::<FromWorker>(session::OUTGOING_DEPTH);
    let to_driver = inbox.clone();
    let forward = tokio::spawn(async move {
        while let Some(message) = messages.recv().await {
            if to_driver.send(Inbound::From(member, message)).await.is_err() {
                return;
            }
        }
    });
    let incoming = UnboundedReceiverStream::new(incoming).map(Ok);
    let transport = Transport {
        welcome,
        incoming: Box::pin(incoming),
        outgoing: Outgoing { control: outgoing.clone(), bulk: outgoing },
        shards: ShardSource::Local(data),
        handover: Handover::InProcess,
    };
    let end = session::run(transport, compute, Leave::never()).await;
    forward.await.context("the worker's messages could not be handed over")?;
    // As a connection's end would tell it; the coordinator may be gone as well.
    let _ = inbox.send(Inbound::Closed(member, "the worker has ended".to_owned())).await;
    let end = end?;
    match end {
        SessionEnd::Finished(_) => Ok(()),
        SessionEnd::Evicted(reason) | SessionEnd::Lost(reason) | SessionEnd::Kept(reason) => {
            anyhow::bail!("the worker is out: {reason}")
        }
    }
}

/// Starts `workers` processes of this program that join the coordinator at `url` with `token`.
pub(crate) fn spawn_workers(workers: u32, url: &str, token: &Token, compute: Compute) -> anyhow::Result<Vec<Child>> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let spawn = |number: u32| {
        Command::new(&program)
            .args(["worker", "--coordinator", url, "--name", &format!("local {number}")])
            .args(["--threads", &compute.threads.to_string(), "--simd", compute.isa.name()])
            .args(["--patience", "30", "--quiet", "--parent", &std::process::id().to_string()])
            // Other users of this machine can read the arguments, but not the environment.
            .env(JOIN_TOKEN, token.reveal())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start worker process {number}: {}", program.display()))
    };
    (1..=workers).map(spawn).collect()
}

/// Waits until every worker process has ended; says how the last one that failed did.
pub(crate) async fn all_ended(children: &mut [Child]) -> String {
    let mut last = "no worker process was started".to_owned();
    for child in children {
        last = match child.wait().await {
            Ok(status) => format!("every worker process has ended, the last with {status}"),
            Err(error) => format!("a worker process cannot be watched: {error}"),
        };
    }
    last
}
