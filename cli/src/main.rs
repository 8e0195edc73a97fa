//! `lockstep`: distributed training of autoencoders, with the same bits for any number of workers.

mod audit;
mod bench;
mod certs;
mod connect;
mod control;
mod data_command;
mod data_source;
mod exit;
mod fetch;
mod health;
mod infer;
mod local;
mod model_command;
mod monitor;
mod progress;
mod resume;
mod roles;
mod run_args;
mod serve_args;
mod signals;
mod train;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Trains autoencoders on one machine or many, with the same bits for any number of workers.
#[derive(Parser)]
#[command(name = "lockstep", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train on this machine: in this process, or with --workers N as a coordinator and N worker processes
    Train(train::TrainArgs),
    /// Run a coordinator, which workers on this or other machines join
    Coordinator(Box<roles::CoordinatorArgs>),
    /// Join a coordinator and compute for it
    Worker(roles::WorkerArgs),
    /// Follow a run from another terminal or machine
    Monitor(monitor::MonitorArgs),
    /// Have a run complete its round, write a checkpoint, and end
    Stop(control::StopArgs),
    /// Have a worker hand over its work and leave
    Drain(control::DrainArgs),
    /// Make certificates and tokens for a cluster
    Certs(certs::CertsArgs),
    /// Ask a coordinator whether it serves, for health checks
    Health(health::HealthArgs),
    /// Measure a finished model's loss
    Eval(infer::EvalArgs),
    /// Write the codes of a data set
    Encode(infer::EncodeArgs),
    /// Write the reconstructions of a data set, as numbers or as a picture
    Reconstruct(infer::ReconstructArgs),
    /// Look at models: check a file, list or show the presets
    Model(model_command::ModelArgs),
    /// Look at data, or fetch Fashion-MNIST
    Data(data_command::DataArgs),
    /// Prove from a run's ledger that every sample was used exactly once an epoch
    Audit(audit::AuditArgs),
    /// Measure this machine, and how much of it training uses
    Bench(bench::BenchArgs),
}

/// What is logged: what `LOCKSTEP_LOG` says, or else warnings. h2 warns of every connection whose peer breaks a rule: any
/// stranger could fill a disk with that, so that it must be asked for by name (`LOCKSTEP_LOG=warn,h2=warn`).
fn log_filter() -> EnvFilter {
    let filter = |wanted: &str| EnvFilter::try_new(format!("h2=error,{wanted}"));
    let wanted = std::env::var("LOCKSTEP_LOG").ok().and_then(|wanted| filter(&wanted).ok());
    wanted.unwrap_or_else(|| EnvFilter::new("h2=error,warn"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(log_filter())
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    if let Err(error) = signals::end_process_one() {
        return exit::report(&error);
    }
    let result = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Coordinator(args) => roles::coordinator(&args),
        Command::Worker(args) => roles::worker(args),
        Command::Monitor(args) => monitor::run(args),
        Command::Stop(args) => control::stop(args),
        Command::Drain(args) => control::drain(args),
        Command::Certs(args) => certs::run(args),
        Command::Health(args) => health::run(&args),
        Command::Eval(args) => infer::eval(args),
        Command::Encode(args) => infer::encode(args),
        Command::Reconstruct(args) => infer::reconstruct(args),
        Command::Model(args) => model_command::run(args),
        Command::Data(args) => data_command::run(args),
        Command::Audit(args) => audit::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
