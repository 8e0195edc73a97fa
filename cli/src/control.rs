//! `lockstep stop` and `lockstep drain`: what operators do to a run from another terminal or machine.

use anyhow::Context;
use clap::Args;
use lockstep_common::protocol::{MemberId, WorkerChoice};
use lockstep_proto::target::Connection;
use lockstep_proto::v1::control_service_client::ControlServiceClient;
use lockstep_proto::{transport, v1};

use crate::connect::{self, CONTROL_TOKEN, ConnectArgs, Reached};
use crate::roles;

/// Arguments of `lockstep stop`.
#[derive(Args, Debug)]
pub(crate) struct StopArgs {
    /// The coordinator, such as https://10.0.0.1:7400
    address: String,
    #[command(flatten)]
    connect: ConnectArgs,
    /// Why, for people; it becomes part of the run's outcome
    #[arg(long, value_name = "TEXT", default_value = "stopped by an operator")]
    reason: String,
}

/// Arguments of `lockstep drain`.
#[derive(Args, Debug)]
pub(crate) struct DrainArgs {
    /// The coordinator, such as https://10.0.0.1:7400
    address: String,
    /// The worker: its name, or what it is called in the run, such as w3#1
    worker: String,
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Runs `lockstep stop`.
pub(crate) fn stop(args: StopArgs) -> anyhow::Result<()> {
    let StopArgs { address, connect, reason } = args;
    command(&connect, &address, async |Commanding { reached, mut client }| {
        reached.answer(client.stop_run(v1::StopRunRequest { reason })).await?;
        println!("the run completes its round, writes a checkpoint, and ends");
        Ok(())
    })
}

/// Runs `lockstep drain`.
pub(crate) fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let DrainArgs { address, worker, connect } = args;
    command(&connect, &address, async |Commanding { reached, mut client }| {
        let request = v1::DrainWorkerRequest::from(WorkerChoice::from(&worker[..]));
        let response = reached.answer(client.drain_worker(request)).await?;
        let member = MemberId::try_from(response.member.context("the coordinator named no worker")?)?;
        println!("{member} hands over its work and leaves");
        Ok(())
    })
}

/// A coordinator, and the way to command it.
struct Commanding {
    reached: Reached,
    client: ControlServiceClient<Connection>,
}

fn command(
    connect: &ConnectArgs,
    address: &str,
    act: impl AsyncFnOnce(Commanding) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let target = connect.target(address, CONTROL_TOKEN)?;
    roles::runtime()?.block_on(async {
        let reached = connect::connect(&target).await?;
        let client = transport::control_client(reached.connection.clone());
        act(Commanding { reached, client }).await
    })
}
