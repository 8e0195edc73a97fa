//! `lockstep monitor`: follow a run from another terminal or machine.

use clap::Args;
use lockstep_common::progress::{RunStatus, TimedEvent};
use lockstep_proto::convert;
use lockstep_proto::status::describe;
use lockstep_proto::{transport, v1};
use tonic::Status;

use crate::connect::{self, ConnectArgs, Reached, WATCH_TOKEN};
use crate::progress::{Display, Form};
use crate::roles;

/// Arguments of `lockstep monitor`.
#[derive(Args, Debug)]
pub(crate) struct MonitorArgs {
    /// The coordinator, such as https://10.0.0.1:7400
    url: String,
    #[command(flatten)]
    connect: ConnectArgs,
    /// Show everything from this round on, not only what happens from now on
    #[arg(long, value_name = "ROUND")]
    from_round: Option<u64>,
    /// List the workers and end
    #[arg(long)]
    workers: bool,
    /// Print events as JSON lines
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: MonitorArgs) -> anyhow::Result<()> {
    let target = args.connect.target(&args.url, WATCH_TOKEN)?;
    roles::runtime()?.block_on(async {
        let reached = connect::connect(&target).await?;
        if args.workers { list_workers(&reached).await } else { follow(&reached, &args, &target.url).await }
    })
}

async fn follow(reached: &Reached, args: &MonitorArgs, url: &str) -> anyhow::Result<()> {
    let mut client = transport::monitor_client(reached.connection.clone());
    let status = reached.answer(client.get_run(v1::GetRunRequest {})).await?;
    let status = RunStatus::try_from(status)?;
    let mut display = Display::new(Form::choose(args.json), &status);
    let from_round = args.from_round.unwrap_or(status.rounds);
    let mut events = reached.answer(client.watch(v1::WatchRequest { from_round })).await?;
    let ended = |status: Status| anyhow::anyhow!("lost the coordinator at {url}: {}", describe(&status));
    while let Some(response) = events.message().await.map_err(ended)? {
        if !display.event(&TimedEvent::try_from(response)?) {
            return Ok(());
        }
    }
    anyhow::bail!("the coordinator at {url} ended the stream before the run ended")
}

async fn list_workers(reached: &Reached) -> anyhow::Result<()> {
    let mut client = transport::monitor_client(reached.connection.clone());
    let response = reached.answer(client.list_workers(v1::ListWorkersRequest {})).await?;
    println!(
        "{:8} {:24} {:8} {:>7} {:8} {:>7} {:>10} {:>9} {:>7} {:>8}",
        "member", "name", "simd", "threads", "tensors", "shards", "leaves", "ms a leaf", "hedged", "silent"
    );
    for worker in convert::workers(response)? {
        println!(
            "{:8} {:24} {:8} {:>7} {:8} {:>7} {:>10} {:>9} {:>7} {:>6.1} s",
            worker.member.to_string(),
            worker.name,
            worker.isa,
            worker.threads,
            worker.transport.name(),
            worker.cached_shards,
            worker.leaves_computed,
            worker.leaf_time.map_or("-".to_owned(), |time| format!("{:.1}", time.as_secs_f64() * 1e3)),
            worker.leaves_hedged,
            worker.silent_for.as_secs_f64()
        );
    }
    Ok(())
}
