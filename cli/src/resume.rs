//! `--resume`: a run's directory, and what there is to go on from.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use lockstep_common::checkpoint::{Checkpoint, continuity};
use lockstep_common::config::{RunConfig, RunSpec};
use lockstep_common::fingerprint::fingerprint;
use lockstep_common::hash::Digest;
use lockstep_common::kernel::{Arithmetic, Isa};
use lockstep_common::ledger::Header;
use lockstep_coordinator::Origin;
use lockstep_coordinator::aggregate::Start;
use lockstep_coordinator::checkpoint::CHECKPOINTS;
use lockstep_coordinator::outputs::CONFIG_FILE;
use lockstep_coordinator::resume;

use crate::exit::usage;

/// A run that was begun before.
pub(crate) struct Begun {
    directory: PathBuf,
    /// Its configuration, as it stands in its directory.
    pub(crate) text: String,
    /// Its configuration when the checkpoint was taken.
    began: RunConfig,
    /// Without one, the run starts with its first round again.
    checkpoint: Option<Checkpoint>,
}

impl Begun {
    /// Whether there is a run in this directory, be it one that has not come far.
    pub(crate) fn is_in(directory: &Path) -> bool {
        directory.join(CONFIG_FILE).exists() || directory.join(CHECKPOINTS).exists()
    }

    /// Looks at a run's directory. Changes nothing.
    pub(crate) fn open(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join(CONFIG_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(usage(anyhow!("cannot read {}: {error}", path.display()))),
        };
        let found =
            resume::find(directory).map_err(|reason| anyhow!("cannot resume {}: {reason}", directory.display()))?;
        for damaged in &found.damaged {
            eprintln!("notice: {damaged}");
        }
        let checkpoint = found.checkpoint;
        let began = checkpoint.as_ref().map(|checkpoint| checkpoint.state.config.clone());
        let Some(text) = text.or_else(|| began.clone()) else {
            return Err(usage(anyhow!(
                "there is no run in {}: it has neither {CONFIG_FILE} nor a checkpoint; to begin one there, say --out instead of --resume",
                directory.display()
            )));
        };
        let began = RunConfig::parse("the checkpoint's configuration", began.as_ref().unwrap_or(&text), &[]);
        let began = began.context("the run was begun by another version of lockstep")?;
        match &checkpoint {
            Some(checkpoint) => {
                eprintln!("going on with {} after round {}", directory.display(), checkpoint.state.standing.rounds);
            }
            None => eprintln!(
                "notice: {} has no checkpoint to go on from: the run starts with its first round again",
                directory.display()
            ),
        }
        Ok(Self { directory: directory.to_owned(), text, began, checkpoint })
    }

    /// Whether parameters to start from are needed.
    pub(crate) fn starts_again(&self) -> bool {
        self.checkpoint.is_none()
    }

    /// Checks that this is the same run, in everything that matters. Gives where it goes on.
    pub(crate) fn origin(self, now: Now<'_>) -> anyhow::Result<Origin> {
        if let Some(changed) = continuity::changed(&self.began, now.config).map_err(usage)? {
            return Err(usage(anyhow!("cannot resume {}: {changed}", self.directory.display())));
        }
        let refuse = |reason: String| usage(anyhow!("cannot resume {}: {reason}", self.directory.display()));
        match (self.checkpoint, now.initial) {
            (Some(checkpoint), _) => {
                let arithmetic = Arithmetic { isa: now.isa, compute: now.spec.precision.compute };
                resume::check(&checkpoint.state, now.spec, now.data, fingerprint(arithmetic)).map_err(refuse)?;
                Ok(Origin::Checkpoint(Box::new(checkpoint)))
            }
            (None, Some(initial)) => {
                let header = Header::of(now.spec, &initial.parameters);
                resume::check_again(&self.directory, &header).map_err(refuse)?;
                Ok(Origin::Again(initial))
            }
            (None, None) => bail!("there is nothing to start from"),
        }
    }
}

/// The run as it is to go on.
pub(crate) struct Now<'a> {
    pub(crate) config: &'a RunConfig,
    pub(crate) spec: &'a RunSpec,
    pub(crate) data: Digest,
    pub(crate) isa: Isa,
    pub(crate) initial: Option<Start>,
}
