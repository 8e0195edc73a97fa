//! Going on with a run: which checkpoint can be used, and whether the run is still the same.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use lockstep_common::checkpoint::{LedgerPosition, State};
use lockstep_common::config::RunSpec;
use lockstep_common::hash::Digest;
use lockstep_common::ledger::{self, Header, MAX_LINE_BYTES};

use crate::checkpoint::{self, Found};
use crate::journal::LEDGER_FILE;

/// Looks for the newest checkpoint of a run's directory that is whole and whose ledger is there.
///
/// # Errors
/// In words; see [`checkpoint::find`].
pub fn find(directory: &Path) -> Result<Found, String> {
    checkpoint::find(directory, |state| reaches(directory, &state.ledger))
}

/// Checks that the ledger reaches to a position, and has the position's chain digest there.
fn reaches(directory: &Path, position: &LedgerPosition) -> Result<(), String> {
    let path = directory.join(LEDGER_FILE);
    let chain = chain_at(&path, position.bytes).map_err(|reason| format!("{}: {reason}", path.display()))?;
    if chain != position.chain {
        return Err(format!(
            "{}: the chain digest after {} bytes is {chain}, the checkpoint says {}: the ledger was changed",
            path.display(),
            position.bytes,
            position.chain
        ));
    }
    Ok(())
}

/// The chain digest of the line that ends after `bytes` bytes.
fn chain_at(path: &Path, bytes: u64) -> Result<Digest, String> {
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    if length < bytes {
        return Err(format!("it has {length} bytes, the checkpoint belongs to one with at least {bytes}"));
    }
    let start = bytes.saturating_sub(MAX_LINE_BYTES);
    let mut tail = Vec::new();
    let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.take(bytes - start).read_to_end(&mut tail));
    read.map_err(|error| error.to_string())?;
    let Some(lines) = tail.strip_suffix(b"\n") else {
        return Err(format!("no line ends after {bytes} bytes"));
    };
    let before = lines.iter().rposition(|&byte| byte == b'\n');
    let line = &lines[before.map_or(0, |at| at + 1)..];
    let line = std::str::from_utf8(line).map_err(|error| error.to_string())?;
    ledger::chain_after(line, start == 0 && before.is_none())
}

/// Checks that a checkpoint is of this run, computed by this arithmetic from these samples.
///
/// # Errors
/// In words, with both values.
pub fn check(state: &State, spec: &RunSpec, data: Digest, fingerprint: Digest) -> Result<(), String> {
    if state.fingerprint != fingerprint {
        return Err(format!(
            "the run was computed with numerics {} (lockstep {}), this lockstep computes with {fingerprint}: go on with the one that began it",
            state.fingerprint, state.version
        ));
    }
    if state.data != data {
        return Err(format!(
            "the data have changed since the run began: their digest was {} and is {data} now; give the same samples, or begin a new run",
            state.data
        ));
    }
    let layout = spec.model.layout.hash();
    if state.layout != layout {
        return Err(format!("layout hash mismatch: the checkpoint has {}, the model {layout}", state.layout));
    }
    let (done, total) = (state.standing.rounds, spec.total_rounds());
    if total < done {
        return Err(format!(
            "{done} rounds are done, and epochs and max_rounds would end the run after {total}; they can only be raised beyond what is done"
        ));
    }
    Ok(())
}

/// Checks that what a run without a checkpoint has left is of a run like this one.
///
/// # Errors
/// In words, if a ledger of another run is there.
pub fn check_again(directory: &Path, header: &Header) -> Result<(), String> {
    let path = directory.join(LEDGER_FILE);
    let mut line = String::new();
    match File::open(&path).and_then(|file| BufReader::new(file).take(MAX_LINE_BYTES).read_line(&mut line)) {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => return Ok(()),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    }
    // A header that is torn says nothing.
    match ledger::read_header(line.trim_end_matches('\n')) {
        Ok(there) if there != *header => {
            let text = |header| serde_json::to_string(header).unwrap_or_default();
            Err(format!("{} is of another run: it begins with {}, not {}", path.display(), text(&there), text(header)))
        }
        _ => Ok(()),
    }
}
