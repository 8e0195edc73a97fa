//! The run's growing files: the ledger and the events, written by a thread of their own so that a slow disk does not
//! hold up rounds.
//!
//! When a file cannot be written, its lines wait in memory and are tried again; nothing is left out of the ledger. If too
//! many wait, the run stops: a round that is not in the ledger is not proven.

use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lockstep_common::checkpoint::LedgerPosition;
use lockstep_common::ledger::{Chain, Header, Record};
use lockstep_common::progress::TimedEvent;
use tracing::error;

use crate::log_file::LogFile;
use crate::trouble::{Trouble, Troubles};

/// Name of the ledger in a run's directory.
pub const LEDGER_FILE: &str = "ledger.jsonl";
/// Name of the event log in a run's directory.
pub const EVENTS_FILE: &str = "events.jsonl";

/// Lines are handed to the system at least this often, so that another process can follow them; and as often it is tried
/// again what has failed.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// Lines that may wait for the journal's thread: some minutes of rounds.
const QUEUE_DEPTH: usize = 1 << 15;

/// Lines are handed to the system when so many bytes are waiting.
const BUFFER_BYTES: usize = 1 << 13;

/// So much of each file may wait in memory for a disk that takes nothing: about 30,000 rounds.
const MAX_WAITING_BYTES: usize = 64 << 20;

enum Line {
    Record(Box<Record>),
    Event(Box<TimedEvent>),
    Mark(mpsc::SyncSender<Position>),
}

/// How long the files are.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    /// The ledger.
    pub ledger: LedgerPosition,
    /// The event log.
    pub events_bytes: u64,
}

/// Writes a run's ledger and events.
pub struct Journal {
    lines: mpsc::SyncSender<Line>,
    writer: JoinHandle<()>,
}

impl Journal {
    /// Creates both files in `directory` and starts the writer. What is there of a run with the same ledger header, which
    /// has no checkpoint yet, is replaced if `replace` is set.
    ///
    /// # Errors
    /// When a file cannot be created, is there, or is written by another process.
    pub fn create(
        directory: &Path,
        header: &Header,
        replace: bool,
        troubles: mpsc::Sender<Trouble>,
    ) -> io::Result<Self> {
        let (chain, first_line) = Chain::start(header);
        let open = if replace { LogFile::replace } else { LogFile::create };
        let mut ledger = open(&directory.join(LEDGER_FILE))?;
        ledger.append(&first_line);
        ledger.write()?;
        let events = open(&directory.join(EVENTS_FILE))?;
        Self::start(chain, ledger, events, MAX_WAITING_BYTES, troubles)
    }

    /// Goes on with files that are at least as long as `position` says. What comes after it is cut off.
    ///
    /// # Errors
    /// When a file cannot be opened or cut, or is written by another process.
    pub fn resume(directory: &Path, position: &Position, troubles: mpsc::Sender<Trouble>) -> io::Result<Self> {
        let ledger = LogFile::resume(&directory.join(LEDGER_FILE), position.ledger.bytes)?;
        let events = LogFile::resume(&directory.join(EVENTS_FILE), position.events_bytes)?;
        Self::start(Chain::resume(position.ledger.chain), ledger, events, MAX_WAITING_BYTES, troubles)
    }

    fn start(
        chain: Chain,
        ledger: LogFile,
        events: LogFile,
        max_waiting_bytes: usize,
        troubles: mpsc::Sender<Trouble>,
    ) -> io::Result<Self> {
        let (lines, queue) = mpsc::sync_channel(QUEUE_DEPTH);
        let sink = |file, about| Sink {
            file,
            troubles: Troubles::new(about, troubles.clone()),
            left_out: 0,
            max_waiting_bytes,
        };
        let (ledger, events) = (sink(ledger, LEDGER_FILE), sink(events, EVENTS_FILE));
        let writer = Writer { chain, ledger, events, flushed: Instant::now() };
        let writer = std::thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run(&queue))?;
        Ok(Self { lines, writer })
    }

    /// Appends a round to the ledger. Waits only if the thread is minutes behind.
    pub fn record(&self, record: &Record) {
        self.append(Line::Record(Box::new(record.clone())));
    }

    /// Appends an event.
    pub fn event(&self, event: &TimedEvent) {
        self.append(Line::Event(Box::new(event.clone())));
    }

    /// How long the files are after everything that was appended so far, once that is on the disk. Nothing comes if it
    /// cannot be written.
    pub fn position(&self) -> mpsc::Receiver<Position> {
        let (answer, position) = mpsc::sync_channel(1);
        self.append(Line::Mark(answer));
        position
    }

    fn append(&self, line: Line) {
        if self.lines.send(line).is_err() {
            error!("the journal's thread has ended: the ledger is not written any more");
        }
    }

    /// Writes what is waiting, syncs both files and ends.
    pub fn close(self) {
        drop(self.lines);
        if self.writer.join().is_err() {
            error!("the journal's thread has panicked: the ledger may be incomplete");
        }
    }
}

/// A file, and what is wrong with it.
struct Sink {
    file: LogFile,
    troubles: Troubles,
    /// Lines that are missing because too many waited.
    left_out: u64,
    /// How much may wait.
    max_waiting_bytes: usize,
}

impl Sink {
    /// Writes what waits and whatever else `then` does; tells of trouble that begins or is over.
    fn attempt(&mut self, then: impl FnOnce(&mut LogFile) -> io::Result<()>) -> bool {
        let name = self.file.path().display().to_string();
        match self.file.restore().and_then(|()| self.file.write()).and_then(|()| then(&mut self.file)) {
            Ok(()) => {
                let left_out = std::mem::take(&mut self.left_out);
                self.troubles.over(|| match left_out {
                    0 => format!("{name} is written again; nothing is missing in it"),
                    lines => format!("{name} is written again; {lines} lines are missing in it"),
                });
                true
            }
            Err(error) => {
                self.troubles
                    .began(format!("cannot write {name}: {error}; training goes on, its lines wait in memory"));
                false
            }
        }
    }

    fn is_overfull(&self) -> bool {
        self.file.waiting_bytes() > self.max_waiting_bytes
    }
}

struct Writer {
    chain: Chain,
    ledger: Sink,
    events: Sink,
    flushed: Instant,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Line>) {
        loop {
            let wait = FLUSH_INTERVAL.saturating_sub(self.flushed.elapsed());
            match queue.recv_timeout(wait) {
                Ok(line) => self.line(line),
                Err(mpsc::RecvTimeoutError::Timeout) => self.flush(),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        for sink in [&mut self.ledger, &mut self.events] {
            sink.attempt(LogFile::sync);
        }
    }

    fn line(&mut self, line: Line) {
        match line {
            Line::Record(record) => {
                self.ledger.file.append(&self.chain.line(&record));
                if self.ledger.is_overfull() {
                    let (path, waiting) = (self.ledger.file.path().display(), self.ledger.file.waiting_bytes());
                    self.ledger.troubles.fatal(format!(
                        "{path} could not be written for so long that {waiting} bytes wait for it, more than the {} that may: a round that is not in the ledger is not proven",
                        self.ledger.max_waiting_bytes
                    ));
                }
            }
            Line::Event(_) if self.events.is_overfull() => self.events.left_out += 1,
            Line::Event(event) => match serde_json::to_string(&*event) {
                Ok(text) => self.events.file.append(&text),
                Err(error) => self.events.troubles.began(format!("an event has no JSON form: {error}")),
            },
            Line::Mark(answer) => return self.mark(&answer),
        }
        let full = |sink: &Sink| !sink.troubles.any() && sink.file.waiting_bytes() >= BUFFER_BYTES;
        if self.flushed.elapsed() >= FLUSH_INTERVAL || full(&self.ledger) || full(&self.events) {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.flushed = Instant::now();
        for sink in [&mut self.ledger, &mut self.events] {
            sink.attempt(|_| Ok(()));
        }
    }

    /// The answer is dropped if the ledger is not whole on the disk.
    fn mark(&mut self, answer: &mpsc::SyncSender<Position>) {
        self.flushed = Instant::now();
        // Events prove nothing: they may be behind, and what is behind is cut off when the run goes on.
        self.events.attempt(|_| Ok(()));
        if self.ledger.attempt(LogFile::sync) {
            let ledger = LedgerPosition { bytes: self.ledger.file.written_bytes(), chain: self.chain.last() };
            // It holds one answer, and whoever asked may be gone.
            let _ = answer.try_send(Position { ledger, events_bytes: self.events.file.written_bytes() });
        }
    }
}

#[cfg(test)]
mod tests {
    use lockstep_common::hash::Digest;
    use lockstep_common::progress::Event;
    use lockstep_common::protocol::MemberId;

    use super::*;
    use crate::trouble::Trouble;

    /// A round's record.
    fn record(round: u64) -> Record {
        let node = lockstep_common::reduce::NodeId::leaf(0);
        let by = MemberId { worker: 1, incarnation: 1 };
        Record {
            round,
            epoch: 0,
            batch: round as u32,
            samples: 1,
            loss: 1.0,
            gradient_norm: 1.0,
            parameters: Digest(1),
            skipped: false,
            nodes: vec![lockstep_common::ledger::Contribution { by, node }],
            leaves: vec![Digest(2)],
            hedged: Vec::new(),
            checked: Vec::new(),
        }
    }

    /// Scenario: the disk takes nothing, and rounds go on. Property: people are told at once; the run is told to stop when
    /// more of the ledger waits than may, and not before; events beyond the bound are left out, rounds never; no position
    /// is given out that is not on the disk; when the disk takes something again, the ledger is whole.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_ledger_that_waits_for_too_long_stops_the_run() {
        const BOUND: usize = 5000;
        let directory = tempfile::tempdir().unwrap();
        let (ledger, events) = (directory.path().join(LEDGER_FILE), directory.path().join(EVENTS_FILE));
        let (mut ledger_log, disk) = LogFile::on_full_disk(&ledger);
        ledger_log.append("header");
        let (troubles, told) = mpsc::channel();
        let (events_log, _) = LogFile::on_full_disk(&events);
        let sink = |file, about| Sink {
            file,
            troubles: Troubles::new(about, troubles.clone()),
            left_out: 0,
            max_waiting_bytes: BOUND,
        };
        let mut writer = Writer {
            chain: Chain::resume(Digest(0)),
            ledger: sink(ledger_log, LEDGER_FILE),
            events: sink(events_log, EVENTS_FILE),
            flushed: Instant::now(),
        };
        writer.flush();
        let began: Vec<Trouble> = told.try_iter().collect();
        assert!(matches!(&began[..], [Trouble::Began { .. }, Trouble::Began { .. }]), "{began:?}");

        let event = TimedEvent { unix_ms: 1, event: Event::Notice { message: "x".repeat(1000) } };
        let mut rounds = 0;
        let fatal = loop {
            writer.line(Line::Record(Box::new(record(rounds))));
            writer.line(Line::Event(Box::new(event.clone())));
            rounds += 1;
            if let Ok(trouble) = told.try_recv() {
                break trouble;
            }
            assert!(writer.ledger.file.waiting_bytes() <= BOUND, "it was not told to stop");
        };
        let Trouble::Fatal { message } = fatal else { panic!("{fatal:?}") };
        assert!(message.contains("more than the 5000 that may: a round that is not in the ledger"), "{message}");
        assert!(writer.events.left_out > 0 && writer.events.file.waiting_bytes() < BOUND + 2000);
        let (answer, position) = mpsc::sync_channel(1);
        writer.mark(&answer);
        drop(answer);
        assert!(position.recv().is_err(), "nothing is on the disk");

        writer.ledger.file.back_on(disk);
        writer.flush();
        let lines = std::fs::read_to_string(&ledger).unwrap().lines().count() as u64;
        assert_eq!(lines, 1 + rounds);
    }
}
