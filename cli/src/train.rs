//! `lockstep train`: a whole run on this machine.

use anyhow::Context;
use clap::Args;
use indicatif::HumanCount;
use lockstep_common::image_grid::GridError;
use lockstep_common::kernel::Isa;
use lockstep_common::model_file::TrainedModel;
use lockstep_common::nn::Loss;
use lockstep_common::pca::Pca;
use lockstep_coordinator::grpc::{self, CredentialSources, Credentials, TokenSource, TokenSources};
use lockstep_coordinator::outputs::{MODEL_FILE, Summary};
use lockstep_coordinator::round::Outcome;
use lockstep_coordinator::{Origin, RunResult};
use lockstep_proto::token::Token;
use lockstep_worker::session::Compute;
use tokio::net::TcpListener;

use crate::exit::usage;
use crate::infer::eval;
use crate::infer::inference::Inference;
use crate::infer::reconstruct::{DEFAULT_COUNT, draw};
use crate::infer::{Part, Samples};
use crate::progress::{self, Form};
use crate::run_args::{ComputeArgs, Prepared, RunArgs};
use crate::signals::Asked;
use crate::{local, roles};

/// Name of the picture of originals over reconstructions in a run's directory.
const PICTURE_FILE: &str = "reconstructions.png";

/// The baseline is part of the summary if it takes no more operations than this: some ten seconds of two cores.
const MAX_BASELINE_OPERATIONS: f64 = 2e11;

/// Arguments of `lockstep train`.
#[derive(Args, Debug)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Worker processes on this machine; without it, one worker inside this process. The result is the same
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: Option<u32>,
    /// Print events and the summary as JSON lines
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: TrainArgs) -> anyhow::Result<()> {
    let isa = args.compute.simd;
    let compute = Compute { isa, threads: args.compute.threads(args.workers.unwrap_or(1) as usize) };
    let (mut prepared, origin) = args.run.prepare(isa)?;
    // Only this machine's workers can come. They start together; if one is lost later, the others go on.
    let workers = args.workers.unwrap_or(1);
    let shards = prepared.spec.schedule.tree.shards();
    if workers > shards {
        return Err(usage(anyhow::anyhow!(
            "--workers is {workers}, but only {shards} can work at {shards} shards; raise --shards"
        )));
    }
    prepared.spec.start_workers = workers;
    prepared.spec.min_workers = prepared.spec.min_workers.min(workers);
    let form = Form::choose(args.json);
    if form != Form::Json {
        announce(&prepared, &compute, args.workers);
    }
    let result = roles::runtime()?.block_on(train(&prepared, origin, compute, args.workers, form))?;
    finish(&prepared, &result, isa, form)
}

fn announce(prepared: &Prepared, compute: &Compute, workers: Option<u32>) {
    let spec = &prepared.spec;
    let how = match workers {
        None => format!("one worker in this process, {}", threads(compute.threads)),
        Some(workers) => format!("{workers} worker processes with {} each", threads(compute.threads)),
    };
    eprintln!(
        "training {} ({} parameters) on {} samples of {}: {how}, {}",
        spec.model.spec.name,
        HumanCount(spec.model.layout.parameters() as u64),
        HumanCount(u64::from(spec.schedule.samples.get())),
        prepared.training.name(),
        compute.isa,
    );
}

fn threads(count: usize) -> String {
    if count == 1 { "1 thread".to_owned() } else { format!("{count} threads") }
}

async fn train(
    prepared: &Prepared,
    origin: Origin,
    compute: Compute,
    workers: Option<u32>,
    form: Form,
) -> anyhow::Result<RunResult> {
    let mut asked = Asked::listen();
    let coordinator = prepared.start(origin, compute.isa, workers.is_some())?;
    let shown = tokio::spawn(progress::follow(coordinator.hub(), form));
    let result = match workers {
        None => {
            let (inbox, data) = (coordinator.inbox(), prepared.data.clone());
            let worker = tokio::spawn(local::in_process_worker(inbox, data, compute));
            let failed = async {
                match worker.await {
                    // It ends well only when the run has ended.
                    Ok(Ok(())) => std::future::pending().await,
                    Ok(Err(error)) => format!("the worker failed: {error:#}"),
                    Err(error) => format!("the worker failed: {error}"),
                }
            };
            let shutdown = async {
                tokio::select! {
                    reason = asked.wait() => reason,
                    reason = failed => reason,
                }
            };
            coordinator.run(shutdown).await
        }
        Some(workers) => {
            let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen on a loopback port")?;
            let url = format!("http://{}", listener.local_addr().context("cannot tell the loopback port")?);
            // Other users of this machine reach the port as well.
            let token = Token::random().context("cannot make a token")?;
            let server = grpc::serve(listener, prepared.served(&coordinator), only_with(&token)?);
            let mut children = local::spawn_workers(workers, &url, &token, compute)?;
            let shutdown = async {
                tokio::select! {
                    reason = asked.wait() => reason,
                    reason = local::all_ended(&mut children) => reason,
                }
            };
            let result = coordinator.run(shutdown).await;
            roles::wait_briefly(server.shut_down()).await;
            roles::wait_briefly(local::all_ended(&mut children)).await;
            result
        }
    };
    shown.await.context("the progress display failed")?;
    Ok(result)
}

/// Credentials that let in who has the token, to work and for nothing else.
fn only_with(token: &Token) -> anyhow::Result<Credentials> {
    let tokens = TokenSources { join: TokenSource::Fixed(token.clone()), watch: None, control: None };
    Ok(Credentials::load(CredentialSources { tls: None, tokens: Some(tokens) })?)
}

/// Writes the results and says where they are.
fn finish(prepared: &Prepared, result: &RunResult, isa: Isa, form: Form) -> anyhow::Result<()> {
    let summary = prepared.leave_results("train", result)?;
    let directory = &prepared.directory;
    if form == Form::Json {
        println!("{}", serde_json::to_string(&summary)?);
    }
    if let Outcome::Failed(reason) = &result.outcome {
        anyhow::bail!("{reason}");
    }
    let part = if prepared.validation.is_some() { Part::Validation } else { Part::Train };
    let samples = Samples::new(prepared.training.clone(), prepared.validation.clone(), part);
    let trained = TrainedModel::load(&directory.join(MODEL_FILE))?;
    let inference = Inference::new(&trained, prepared.spec.loss, isa);
    let picture = directory.join(PICTURE_FILE);
    let drawn = match draw(&picture, &inference, &samples, DEFAULT_COUNT)? {
        Ok(_) => true,
        Err(GridError::NotAnImage { .. }) => false,
        Err(error) => return Err(error).with_context(|| format!("cannot draw {}", picture.display())),
    };
    if form != Form::Json {
        print_summary(prepared, &summary, &samples);
        println!();
        println!("model            {}", directory.join(MODEL_FILE).display());
        if drawn {
            println!("reconstructions  {}", picture.display());
        }
        println!("proof            lockstep audit {}", directory.display());
    }
    if let Outcome::Stopped(reason) = &result.outcome {
        let (rounds, total) = (result.rounds, prepared.spec.total_rounds());
        anyhow::bail!(
            "stopped after {rounds} of {total} rounds: {reason}; the model so far is in {}; {}",
            directory.display(),
            prepared.how_to_go_on("train", result)
        );
    }
    Ok(())
}

fn print_summary(prepared: &Prepared, summary: &Summary, samples: &Samples) {
    let loss = |loss: Option<f64>| loss.map_or("-".to_owned(), |loss| format!("{loss:.5}"));
    println!();
    println!("train loss       {}", loss(summary.train_loss));
    println!("validation loss  {}", loss(summary.val_loss));
    if prepared.spec.loss == Loss::Mse && summary.val_loss.is_some() {
        println!("{}", baseline(prepared, samples));
    }
    println!(
        "{} rounds, {} samples in {:.1} s: {} samples/s",
        HumanCount(summary.rounds),
        HumanCount(summary.samples_seen),
        summary.wall_seconds,
        HumanCount(summary.samples_per_second as u64)
    );
    println!("parameters       sha256 {}", summary.params_sha256);
}

/// The summary's line on the best linear code.
fn baseline(prepared: &Prepared, samples: &Samples) -> String {
    let code = prepared.spec.model.code_shape().elements();
    let (count, features) = (prepared.training.len(), prepared.training.sample_elements());
    if Pca::fit_operations(count, features, code) > MAX_BASELINE_OPERATIONS {
        let (directory, data) = (prepared.directory.display(), prepared.data_source());
        return format!(
            "PCA              not computed, since it takes a while: lockstep eval {directory} --pca --data {data}"
        );
    }
    match eval::pca(samples, code) {
        Ok(pca) => format!("{:15}  {:.5}  (the best linear code of this size)", format!("PCA, {code} values"), pca.mse),
        Err(error) => format!("PCA              not computed: {error}"),
    }
}
