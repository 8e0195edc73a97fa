//! `lockstep health`: what a container's health check runs.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::connect::{self, ConnectArgs, WATCH_TOKEN};
use crate::roles;

/// How long the coordinator may take to answer, connecting included. Docker and Kubernetes should give up later.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);

/// Arguments of `lockstep health`.
#[derive(Args, Debug)]
pub(crate) struct HealthArgs {
    /// The coordinator, such as https://10.0.0.1:7400
    #[arg(default_value = "127.0.0.1:7400")]
    url: String,
    // The question is open to everybody; a token does no harm.
    #[command(flatten)]
    connect: ConnectArgs,
}

/// Runs the command: it succeeds if the coordinator serves.
pub(crate) fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let target = args.connect.target(&args.url, WATCH_TOKEN)?;
    let check = async {
        let reached = connect::connect(&target).await?;
        // The empty name asks for the server as a whole.
        let request = HealthCheckRequest { service: String::new() };
        let mut client = HealthClient::new(reached.connection.clone());
        let response = reached.answer(client.check(request)).await?;
        anyhow::Ok(response.status())
    };
    let url = &target.url;
    let status = roles::runtime()?
        .block_on(async { tokio::time::timeout(ANSWER_TIMEOUT, check).await })
        .with_context(|| format!("no answer from {url} within {} s", ANSWER_TIMEOUT.as_secs()))??;
    if status != ServingStatus::Serving {
        anyhow::bail!("{url} answers, but does not serve: {}", status.as_str_name());
    }
    println!("{url} serves");
    Ok(())
}
