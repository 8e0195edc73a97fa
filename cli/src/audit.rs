//! `lockstep audit`: proves from a finished run's files what the run did.
//!
//! The ledger alone proves which samples were used; the model and the summary beside it must agree with its last line.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use indicatif::{DecimalBytes, HumanCount};
use lockstep_common::hash::Digest;
use lockstep_common::ledger::{self, AUDIT_BYTES_PER_SAMPLE, Audit, AuditError};
use lockstep_common::model_file::TrainedModel;
use lockstep_common::protocol::parameters_digest;
use lockstep_coordinator::journal::LEDGER_FILE;
use lockstep_coordinator::outputs::{MODEL_FILE, SUMMARY_FILE, Summary};
use serde::Serialize;

use crate::exit::usage;

/// Members that are named for people; `--json` names all.
const NAMED_MEMBERS: usize = 12;

/// Samples that any ledger is believed to be about: 38 MB of memory.
const BELIEVED_SAMPLES: u64 = 1 << 22;

/// Samples more for each byte of a ledger. A round's line has some hundred bytes, so that whole epochs are believed up to
/// batches of thousands, and the memory is at most 36 times the ledger's length.
const BELIEVED_SAMPLES_PER_BYTE: u64 = 4;

/// Arguments of `lockstep audit`.
#[derive(Args, Debug)]
pub(crate) struct AuditArgs {
    /// Directory of a run
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// How many training samples the run has at most, if these are more than its ledger is long enough to be believed:
    /// the proof takes 9 bytes of memory for each
    #[arg(long, value_name = "N")]
    samples: Option<u32>,
    /// Print what was proven as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: AuditArgs) -> anyhow::Result<()> {
    let proof = Proof::of(&args.directory, args.samples)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&Report::from(&proof))?);
    } else {
        print!("{proof}");
    }
    Ok(())
}

/// What a run's directory proves.
#[derive(Debug)]
struct Proof {
    audit: Audit,
    /// SHA-256 of the model's parameters, which are those of the ledger's last round; if there is a model.
    params_sha256: Option<String>,
    /// Whether there is a summary. It agrees with everything else.
    summary: bool,
}

impl Proof {
    /// Reads everything and finds nothing wrong, or says what is.
    fn of(directory: &Path, samples: Option<u32>) -> anyhow::Result<Self> {
        let audit = audit_ledger(&directory.join(LEDGER_FILE), samples)?;
        let params_sha256 = check_model(&directory.join(MODEL_FILE), &audit)?;
        let summary = check_summary(&directory.join(SUMMARY_FILE), &audit, params_sha256.as_deref())?;
        Ok(Self { audit, params_sha256, summary })
    }
}

/// Proves the ledger, which may be about `samples` samples, or else about as many as its length makes believable.
fn audit_ledger(path: &Path, samples: Option<u32>) -> anyhow::Result<Audit> {
    let cannot_read = |error: io::Error| {
        let hint = if error.kind() == ErrorKind::NotFound { "; give the directory of a run" } else { "" };
        usage(anyhow!("cannot read the ledger {}: {error}{hint}", path.display()))
    };
    let ledger = File::open(path).map_err(cannot_read)?;
    let bytes = ledger.metadata().map_err(cannot_read)?.len();
    ledger::audit(BufReader::new(ledger), samples.unwrap_or(believed_samples(bytes))).map_err(|error| match error {
        AuditError::TooManySamples { claimed, .. } => usage(anyhow!(
            "the ledger {}: {error}; it has {bytes} bytes. If the run does have as many, say --samples {claimed}: the proof takes {}",
            path.display(),
            DecimalBytes(u64::from(claimed) * AUDIT_BYTES_PER_SAMPLE)
        )),
        // Not as a source: the ledger's errors contain their causes.
        error => anyhow!("{} does not hold: {error}", path.display()),
    })
}

/// How many samples a ledger of so many bytes is believed to be about.
fn believed_samples(bytes: u64) -> u32 {
    let samples = bytes.saturating_mul(BELIEVED_SAMPLES_PER_BYTE).saturating_add(BELIEVED_SAMPLES);
    u32::try_from(samples).unwrap_or(u32::MAX)
}

/// Checks that the model, if there is one, is what the ledger ends with. Returns the SHA-256 of its parameters.
fn check_model(path: &Path, audit: &Audit) -> anyhow::Result<Option<String>> {
    if !exists(path)? {
        return Ok(None);
    }
    let trained = TrainedModel::load(path).map_err(|error| anyhow!("{error}"))?;
    let agree = Agreement { path, other: "the ledger" };
    agree.check("layout of the parameters", trained.model.layout.hash(), audit.header.layout)?;
    agree.check("number of rounds", trained.rounds, audit.rounds)?;
    agree.check("digest of the parameters", parameters_digest(&trained.parameters), audit.parameters)?;
    Ok(Some(trained.model.layout.sha256(&trained.parameters)))
}

/// Checks that the summary, if there is one, agrees with the ledger and the model. Returns whether there is one.
fn check_summary(path: &Path, audit: &Audit, params_sha256: Option<&str>) -> anyhow::Result<bool> {
    if !exists(path)? {
        return Ok(false);
    }
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let summary: Summary =
        serde_json::from_str(&text).with_context(|| format!("{} is not a run's summary", path.display()))?;
    let agree = Agreement { path, other: "the ledger" };
    agree.check("rounds", summary.rounds, audit.rounds)?;
    agree.check("samples_seen", summary.samples_seen, audit.samples_used)?;
    if let Some(params_sha256) = params_sha256 {
        let agree = Agreement { path, other: MODEL_FILE };
        agree.check("params_sha256", summary.params_sha256.as_str(), params_sha256)?;
    }
    Ok(true)
}

fn exists(path: &Path) -> anyhow::Result<bool> {
    path.try_exists().with_context(|| format!("cannot look for {}", path.display()))
}

/// Between a file and something else.
struct Agreement<'a> {
    path: &'a Path,
    other: &'a str,
}

impl Agreement<'_> {
    fn check<T: PartialEq + fmt::Display>(&self, what: &str, found: T, expected: T) -> anyhow::Result<()> {
        if found != expected {
            bail!("{}: {what} is {found}, but {expected} in {}", self.path.display(), self.other);
        }
        Ok(())
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Audit {
            header, rounds, whole_epochs, samples_in_open_epoch, samples_used, members, skipped_rounds, ..
        } = &self.audit;
        let samples = u64::from(header.samples.get());
        writeln!(f, "run {}: {}, {} used", header.run, count(*rounds, "round"), count(*samples_used, "sample"))?;
        if *whole_epochs > 0 {
            let epochs = match whole_epochs {
                1 => "the first epoch".to_owned(),
                _ => format!("each of {}", count((*whole_epochs).into(), "epoch")),
            };
            writeln!(f, "  every one of the {} was used exactly once in {epochs}", count(samples, "sample"))?;
        }
        if *samples_in_open_epoch > 0 {
            let (epoch, used) = (whole_epochs + 1, HumanCount((*samples_in_open_epoch).into()));
            writeln!(
                f,
                "  epoch {epoch} is not complete: {used} of {} were used, each once",
                count(samples, "sample")
            )?;
        }
        if *skipped_rounds > 0 {
            let (rounds, were) = (count(*skipped_rounds, "round"), if *skipped_rounds == 1 { "was" } else { "were" });
            writeln!(f, "  {rounds} {were} skipped, not being finite: the parameters stayed as they were")?;
        }
        if *rounds > 0 {
            let shards = count(header.shards.into(), "leaf");
            writeln!(f, "  every round's sum is complete: each of its {shards} stands in it once, in its place")?;
            let names: Vec<String> = members.iter().take(NAMED_MEMBERS).map(ToString::to_string).collect();
            let more = if members.len() > NAMED_MEMBERS { ", ..." } else { "" };
            writeln!(f, "  computed by {}: {}{more}", count(members.len() as u64, "member"), names.join(", "))?;
        }
        match &self.params_sha256 {
            Some(sha256) => writeln!(f, "  {MODEL_FILE} is what the last round made: sha256 {sha256}")?,
            None => {
                let digest = self.audit.parameters;
                writeln!(f, "  there is no {MODEL_FILE} to compare with the last round's parameters, digest {digest}")?;
            }
        }
        if self.summary {
            writeln!(f, "  {SUMMARY_FILE} agrees")?;
        }
        Ok(())
    }
}

/// A number of things in words.
fn count(number: u64, thing: &str) -> String {
    let plural = match thing {
        _ if number == 1 => thing.to_owned(),
        "leaf" => "leaves".to_owned(),
        _ => format!("{thing}s"),
    };
    format!("{} {plural}", HumanCount(number))
}

/// A proof for programs.
#[derive(Serialize)]
struct Report<'a> {
    run: &'a str,
    seed: u64,
    samples: u32,
    batch_size: u32,
    shards: u32,
    rounds: u64,
    samples_used: u64,
    whole_epochs: u32,
    samples_in_open_epoch: u32,
    skipped_rounds: u64,
    members: Vec<String>,
    parameters_digest: Digest,
    /// `null` without a model.
    params_sha256: Option<&'a str>,
    model_checked: bool,
    summary_checked: bool,
}

impl<'a> From<&'a Proof> for Report<'a> {
    fn from(proof: &'a Proof) -> Self {
        let Audit { header, members, .. } = &proof.audit;
        Self {
            run: &header.run,
            seed: header.seed,
            samples: header.samples.get(),
            batch_size: header.batch_size.get(),
            shards: header.shards,
            rounds: proof.audit.rounds,
            samples_used: proof.audit.samples_used,
            whole_epochs: proof.audit.whole_epochs,
            samples_in_open_epoch: proof.audit.samples_in_open_epoch,
            skipped_rounds: proof.audit.skipped_rounds,
            members: members.iter().map(ToString::to_string).collect(),
            parameters_digest: proof.audit.parameters,
            params_sha256: proof.params_sha256.as_deref(),
            model_checked: proof.params_sha256.is_some(),
            summary_checked: proof.summary,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use lockstep_common::kernel::{Compute, Precision};
    use lockstep_common::ledger::{Chain, Contribution, Header, Record};
    use lockstep_common::model::preset;
    use lockstep_common::nn::initial_parameters;
    use lockstep_common::protocol::MemberId;
    use lockstep_common::reduce::Tree;
    use lockstep_common::shard::{Schedule, samples_digest};
    use tempfile::TempDir;

    use super::*;
    use crate::exit::Usage;

    /// A run of 21 samples in batches of 8 on 4 shards: epochs of 3 rounds.
    fn schedule() -> Schedule {
        Schedule {
            seed: 5,
            samples: NonZeroU32::new(21).unwrap(),
            batch_size: NonZeroU32::new(8).unwrap(),
            tree: Tree::over(4).unwrap(),
            shuffle: true,
        }
    }

    fn trained(rounds: u64) -> TrainedModel {
        let model = preset("conv").unwrap().resolve().unwrap();
        let parameters = initial_parameters(&model.layout, rounds).to_vec();
        TrainedModel { model, parameters, loss: "mse".to_owned(), rounds }
    }

    fn record(schedule: &Schedule, round: u64, parameters: Digest) -> Record {
        let step = schedule.step(round);
        let assignment = schedule.assignment();
        let used = |shard: u32| {
            let order = schedule.epoch_order(step.epoch, shard);
            let places = schedule.leaf_places(step.batch, shard);
            samples_digest(places.map(|place| assignment[shard as usize][order[place as usize] as usize]))
        };
        Record {
            round,
            epoch: step.epoch,
            batch: step.batch,
            samples: schedule.batch_samples(step.batch),
            loss: 0.5,
            gradient_norm: 1.0,
            parameters,
            skipped: false,
            nodes: vec![Contribution { by: MemberId { worker: 2, incarnation: 1 }, node: schedule.tree.root() }],
            leaves: (0..4).map(used).collect(),
            hedged: Vec::new(),
            checked: Vec::new(),
        }
    }

    /// What an honest run of so many rounds leaves.
    fn run_directory(rounds: u64) -> TempDir {
        let (schedule, trained) = (schedule(), trained(rounds));
        let digest = parameters_digest(&trained.parameters);
        let (mut chain, mut ledger) =
            Chain::start(&Header::new("test", &schedule, trained.model.layout.hash(), digest));
        ledger.push('\n');
        for round in 0..rounds {
            ledger.push_str(&chain.line(&record(&schedule, round, digest)));
            ledger.push('\n');
        }
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(LEDGER_FILE), ledger).unwrap();
        trained.save(&directory.path().join(MODEL_FILE)).unwrap();
        let samples_seen = (0..rounds).map(|round| u64::from(schedule.batch_samples(schedule.step(round).batch))).sum();
        let summary = summary(rounds, samples_seen, trained.model.layout.sha256(&trained.parameters));
        fs::write(directory.path().join(SUMMARY_FILE), serde_json::to_string(&summary).unwrap()).unwrap();
        directory
    }

    fn summary(rounds: u64, samples_seen: u64, params_sha256: String) -> Summary {
        Summary {
            params_sha256,
            rounds,
            epochs: 1,
            samples_seen,
            train_loss: None,
            val_loss: None,
            samples_per_second: 1.0,
            wall_seconds: 1.0,
            workers_seen: 1,
            workers_lost: 0,
            shards: 4,
            batch_size: 8,
            seed: 5,
            compute: Compute::F32,
            wire: Precision::F32,
            model: "conv".to_owned(),
            parameters: 1,
            outcome: "completed".to_owned(),
            version: "0".to_owned(),
        }
    }

    #[test]
    fn an_honest_run_is_proven_in_words() {
        let directory = run_directory(8);
        let text = Proof::of(directory.path(), None).unwrap().to_string();
        for expected in [
            "run test: 8 rounds, 58 samples used\n",
            "every one of the 21 samples was used exactly once in each of 2 epochs\n",
            "epoch 3 is not complete: 16 of 21 samples were used, each once\n",
            "each of its 4 leaves stands in it once, in its place\n",
            "computed by 1 member: w2#1\n",
            "model.safetensors is what the last round made: sha256 ",
            "summary.json agrees\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
    }

    #[test]
    fn a_ledger_proves_what_it_can_without_the_other_files() {
        let directory = run_directory(3);
        fs::remove_file(directory.path().join(MODEL_FILE)).unwrap();
        fs::remove_file(directory.path().join(SUMMARY_FILE)).unwrap();
        let proof = Proof::of(directory.path(), None).unwrap();
        let text = proof.to_string();
        assert!(text.contains("there is no model.safetensors to compare"), "{text}");
        assert!(!text.contains("not complete") && !text.contains("summary"), "{text}");
        let json = serde_json::to_value(Report::from(&proof)).unwrap();
        assert_eq!((&json["rounds"], &json["model_checked"]), (&3.into(), &false.into()));
    }

    #[test]
    fn files_that_do_not_agree_are_named_with_both_values() {
        let check = |spoil: &dyn Fn(&Path), expected: &str| {
            let directory = run_directory(4);
            spoil(directory.path());
            let error = Proof::of(directory.path(), None).unwrap_err();
            assert!(!error.is::<Usage>(), "what does not hold is a failure: {error}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        check(&|run| trained(5).save(&run.join(MODEL_FILE)).unwrap(), "number of rounds is 5, but 4 in the ledger");
        let other = TrainedModel { rounds: 4, ..trained(5) };
        check(&|run| other.save(&run.join(MODEL_FILE)).unwrap(), "model.safetensors: digest of the parameters is ");
        check(&|run| fs::write(run.join(MODEL_FILE), "").unwrap(), "is not a safetensors file");
        check(&|run| edit(&run.join(SUMMARY_FILE), "\"rounds\":4", "\"rounds\":3"), "rounds is 3, but 4 in the ledger");
        check(&|run| edit(&run.join(SUMMARY_FILE), "\"samples_seen\":29", "\"samples_seen\":30"), "30, but 29 in");
        check(&|run| edit(&run.join(SUMMARY_FILE), "sha256\":\"", "sha256\":\"0"), "in model.safetensors");
        check(
            &|run| edit(&run.join(LEDGER_FILE), "\"loss\":0.5", "\"loss\":0.4"),
            "does not hold: ledger line 2: chain",
        );
    }

    fn edit(path: &Path, from: &str, to: &str) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    }

    #[test]
    fn a_directory_without_a_ledger_is_the_users_to_mend() {
        let directory = tempfile::tempdir().unwrap();
        let error = Proof::of(directory.path(), None).unwrap_err();
        assert!(error.is::<Usage>());
        assert!(error.to_string().contains("ledger.jsonl: "), "{error}");
    }

    #[test]
    fn more_samples_than_a_ledger_is_long_enough_for_must_be_named() {
        let directory = tempfile::tempdir().unwrap();
        let many = Schedule { samples: NonZeroU32::new(200_000_000).unwrap(), ..schedule() };
        let (_, header) = Chain::start(&Header::new("test", &many, trained(0).model.layout.hash(), Digest(1)));
        let ledger = directory.path().join(LEDGER_FILE);
        fs::write(&ledger, &header).unwrap();
        for samples in [None, Some(199_999_999)] {
            let error = Proof::of(directory.path(), samples).unwrap_err();
            assert!(error.is::<Usage>());
            let expected = format!(
                "it has {} bytes. If the run does have as many, say --samples 200000000: the proof takes 1.80 GB",
                header.len()
            );
            assert!(error.to_string().contains(&expected), "{error}");
        }
        // With length comes belief.
        assert_eq!([0, 1000, u64::MAX].map(believed_samples), [4_194_304, 4_198_304, u32::MAX]);
        let honest = run_directory(3);
        Proof::of(honest.path(), Some(21)).unwrap();
    }
}
