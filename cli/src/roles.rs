//! The parts of a cluster, each as a command of its own: coordinator and worker.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use lockstep_common::kernel::Isa;
use lockstep_coordinator::monitor::Hub;
use lockstep_coordinator::outputs::MODEL_FILE;
use lockstep_coordinator::round::Outcome;
use lockstep_coordinator::{Origin, RunResult, grpc, metrics};
use lockstep_worker::client::{self, WorkerError, WorkerOptions};
use lockstep_worker::session::Compute;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::connect::{ConnectArgs, JOIN_TOKEN};
use crate::exit::usage;
use crate::progress::{self, Form};
use crate::run_args::{ComputeArgs, Prepared, RunArgs};
use crate::serve_args::{ServeArgs, make_room_for};
use crate::signals::Asked;

/// How long this process waits for others to notice that the run has ended.
const FAREWELL: Duration = Duration::from_secs(3);

/// How long a coordinator that goes on with a run answers at least. Workers of the one before it, which was killed, look for
/// it every 2 s; if little or nothing was left to do, they would never hear that the run has ended.
const LATE_FAREWELL: Duration = Duration::from_secs(5);

/// Arguments of `lockstep coordinator`.
#[derive(Args, Debug)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    serve: ServeArgs,
    /// Serve /metrics for Prometheus, and /healthz and /readyz, over HTTP; without encryption, and nothing in it is secret
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<SocketAddr>,
    /// When all rounds are done, go on serving monitors, metrics and health checks until asked to end
    #[arg(long)]
    stay: bool,
    /// Instruction set of the optimizer; the result is the same
    #[arg(long, value_name = "SET", default_value = "auto", value_parser = Isa::parse)]
    simd: Isa,
    /// Print events and the summary as JSON lines
    #[arg(long)]
    json: bool,
}

/// Arguments of `lockstep worker`.
#[derive(Args, Debug)]
pub(crate) struct WorkerArgs {
    /// The coordinator, such as https://10.0.0.1:7400
    #[arg(long, value_name = "URL")]
    coordinator: String,
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Name for people [default: host name and process id]
    #[arg(long)]
    name: Option<String>,
    /// Give up after so many seconds without a coordinator
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    patience: u64,
    /// When asked to end, leave after so many seconds even if the coordinator does not let this worker go
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain_patience: u64,
    /// End with the process of this number, which has started this one
    #[arg(long, value_name = "PID", hide = true)]
    parent: Option<u32>,
    /// When a run has ended, wait for the next one at the same address
    #[arg(long)]
    stay: bool,
    /// Have tensors travel over gRPC, also from and to a coordinator on this host; the result is the same
    #[arg(long)]
    no_shared_memory: bool,
    /// Say nothing unless something is wrong
    #[arg(long)]
    quiet: bool,
}

/// The async runtime: it moves bytes; computing has threads of its own.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).thread_name("io").enable_all().build().context("cannot start the async runtime")
}

/// Waits for something that should happen at once; not for ever.
pub(crate) async fn wait_briefly(what: impl Future) {
    let _ = tokio::time::timeout(FAREWELL, what).await;
}

/// How much longer a coordinator whose run has ended stays for workers that may not have found it yet.
fn late_farewell(goes_on: bool, served_for: Duration) -> Duration {
    if goes_on { LATE_FAREWELL.saturating_sub(served_for) } else { Duration::ZERO }
}

fn bind(runtime: &tokio::runtime::Runtime, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = runtime.block_on(TcpListener::bind(address));
    listener.with_context(|| format!("cannot listen on {address}")).map_err(usage)
}

/// Serves the metrics until the value that this returns is dropped.
fn serve_metrics(listener: TcpListener, hub: Arc<Hub>) -> anyhow::Result<JoinSet<()>> {
    let address = listener.local_addr().context("cannot tell the port")?;
    eprintln!("metrics are at http://{address}/metrics");
    let mut server = JoinSet::new();
    server.spawn(metrics::http::serve(listener, hub));
    Ok(server)
}

/// Writes the results of a run that has ended, and says where they are.
fn leave_results(prepared: &Prepared, result: &RunResult, form: Form) -> anyhow::Result<()> {
    let summary = prepared.leave_results("coordinator", result)?;
    if form == Form::Json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        println!("parameters  sha256 {}", summary.params_sha256);
        println!("model       {}", prepared.directory.join(MODEL_FILE).display());
    }
    Ok(())
}

/// Runs `lockstep coordinator`.
pub(crate) fn coordinator(args: &CoordinatorArgs) -> anyhow::Result<()> {
    let credentials = args.serve.credentials()?;
    let (mut prepared, origin) = args.run.prepare(args.simd)?;
    prepared.spec.max_connections = make_room_for(prepared.spec.max_connections);
    let runtime = runtime()?;
    let listener = bind(&runtime, args.serve.listen)?;
    let metrics_listener = args.metrics_listen.map(|address| bind(&runtime, address)).transpose()?;
    let address = listener.local_addr().context("cannot tell the port")?;
    let form = Form::choose(args.json);
    let goes_on = !matches!(origin, Origin::Fresh(_));
    let result = runtime.block_on(async {
        let mut asked = Asked::listen();
        let coordinator = prepared.start(origin, args.simd, true)?;
        // Also beside JSON: with port 0, nothing else tells the address.
        let (name, scheme) = (&prepared.spec.name, args.serve.scheme());
        eprintln!("run {name:?} waits for workers: lockstep worker --coordinator {scheme}://{address}");
        let _metrics = metrics_listener.map(|listener| serve_metrics(listener, coordinator.hub())).transpose()?;
        let shown = tokio::spawn(progress::follow(coordinator.hub(), form));
        let server = grpc::serve(listener, prepared.served(&coordinator), credentials);
        let serving_since = Instant::now();
        let result = coordinator.run(asked.wait()).await;
        shown.await.context("the progress display failed")?;
        leave_results(&prepared, &result, form)?;
        if args.stay && result.outcome == Outcome::Completed {
            eprintln!("still serving monitors; SIGTERM or Ctrl-C ends this");
            asked.wait().await;
        } else if !matches!(result.outcome, Outcome::Stopped(_)) {
            let _ = tokio::time::timeout(late_farewell(goes_on, serving_since.elapsed()), asked.wait()).await;
        }
        wait_briefly(server.shut_down()).await;
        anyhow::Ok(result)
    })?;
    match &result.outcome {
        Outcome::Completed => Ok(()),
        Outcome::Stopped(reason) => anyhow::bail!(prepared.stopped("coordinator", &result, reason)),
        Outcome::Failed(reason) => anyhow::bail!("{reason}"),
    }
}

/// Runs `lockstep worker`.
pub(crate) fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    if let Some(parent) = args.parent {
        end_with(parent)?;
    }
    let compute = Compute { isa: args.compute.simd, threads: args.compute.threads(1) };
    let options = WorkerOptions {
        coordinator: args.connect.target(&args.coordinator, JOIN_TOKEN)?,
        name: args.name.unwrap_or_else(default_name),
        compute,
        patience: Duration::from_secs(args.patience),
        drain_patience: Duration::from_secs(args.drain_patience),
        shared_memory: !args.no_shared_memory,
        stay: args.stay,
    };
    let quiet = args.quiet;
    let say = move |text: &str| {
        if !quiet {
            eprintln!("{text}");
        }
    };
    runtime()?.block_on(async {
        let mut asked = Asked::listen();
        let (drain, draining) = watch::channel(false);
        let work = client::run(options, draining, &say);
        let mut work = std::pin::pin!(work);
        let end = tokio::select! {
            end = &mut work => end,
            reason = asked.wait() => {
                say(&format!("{reason}: handing over the work; once more to leave at once"));
                drain.send_replace(true);
                tokio::select! {
                    end = &mut work => end,
                    _ = asked.wait() => anyhow::bail!("left without handing over"),
                }
            }
        };
        match end {
            Ok(reason) => {
                say(&reason);
                Ok(())
            }
            Err(error @ WorkerError::NoCoordinator { .. }) => Err(error.into()),
            Err(error) => Err(usage(error)),
        }
    })
}

/// Has the system end this process when its parent ends, however that ends: nobody else knows of this one.
#[cfg(target_os = "linux")]
fn end_with(parent: u32) -> anyhow::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot tie this process to the one that started it")?;
    // It may have ended before that.
    if getppid().is_none_or(|pid| pid.as_raw_nonzero().get() as u32 != parent) {
        anyhow::bail!("process {parent}, which started this one, has ended");
    }
    Ok(())
}

/// Elsewhere, workers notice that the coordinator is gone, and look for it for a while.
#[cfg(not(target_os = "linux"))]
fn end_with(_: u32) -> anyhow::Result<()> {
    Ok(())
}

fn default_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{} {}", host.trim(), std::process::id()).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scenario: a coordinator was killed near the end of its run, and the next one is done at once, or soon, or much
    /// later. Property: it answers for 5 s in all, so that workers that look for it every 2 s hear of the end; it does not
    /// hold up a run that began with it, nor one that went on for long.
    #[test]
    fn workers_of_a_killed_coordinator_are_waited_for() {
        let seconds = Duration::from_secs;
        assert_eq!(late_farewell(true, seconds(0)), seconds(5));
        assert_eq!(late_farewell(true, seconds(3)), seconds(2));
        assert_eq!(late_farewell(true, seconds(60)), seconds(0));
        assert_eq!(late_farewell(false, seconds(0)), seconds(0));
    }
}
