//! What the end-to-end tests share: the real program in a directory of its own, and small models.
//!
//! Nothing here sleeps. A test waits for lines of output, for processes to end, or for messages; the watchdog only turns
//! what would hang for ever into a failure with a message.

#![allow(dead_code, unused_imports, reason = "every test file uses a part")]

pub(crate) mod fake_worker;
pub(crate) mod process;
pub(crate) mod raw_http2;
pub(crate) mod wrong_worker;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) use fake_worker::FakeWorker;
pub(crate) use process::{Ended, Running};

/// A fully connected model with two chunks of parameters.
pub(crate) const DENSE: &str = r#"
    name = "dense-small"
    input = [784]
    encoder = [
        { layer = "dense", units = 170, activation = "relu" },
        { layer = "dense", units = 17 },
    ]
    decoder = [
        { layer = "dense", units = 170, activation = "relu" },
        { layer = "dense", units = 784, activation = "sigmoid" },
    ]
"#;

/// The article's layers with few filters, whose numbers fill no vector.
pub(crate) const CONV: &str = r#"
    name = "article-small"
    input = [28, 28, 1]
    encoder = [
        { layer = "conv2d", filters = 5, kernel_size = 3, activation = "relu" },
        { layer = "max_pool2d" },
        { layer = "conv2d", filters = 7, kernel_size = 3, activation = "relu" },
        { layer = "max_pool2d" },
        { layer = "conv2d", filters = 7, kernel_size = 3, activation = "relu" },
    ]
    decoder = [
        { layer = "conv2d_transpose", filters = 7, kernel_size = 3, strides = 2, activation = "relu" },
        { layer = "conv2d_transpose", filters = 5, kernel_size = 3, strides = 2, padding = "same", activation = "relu" },
        { layer = "conv2d_transpose", filters = 1, kernel_size = 3, strides = 2, padding = "same", activation = "sigmoid" },
    ]
"#;

/// A fully connected model that takes no time at all, for tests of everything but arithmetic.
pub(crate) const TINY: &str = r#"
    name = "tiny"
    input = [784]
    encoder = [{ layer = "dense", units = 4, activation = "relu" }]
    decoder = [{ layer = "dense", units = 784, activation = "sigmoid" }]
"#;

/// What makes runs short and alike: 16 shards, batches of 64, and 100 of the bundled images to validate on; and a lease
/// that no stall of a busy machine outlasts. Any of it can be overridden by options that follow.
const QUICK: [&str; 10] = [
    "--set",
    "seed=7",
    "--set",
    "shards=16",
    "--set",
    "batch_size=64",
    "--set",
    "data.validation_fraction=0.01",
    "--set",
    "cluster.lease_timeout_ms=60000",
];

/// A directory to run programs in.
pub(crate) struct Place {
    directory: TempDir,
}

impl Place {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a temporary directory") }
    }

    /// One with a model in `model.toml`.
    pub(crate) fn with_model(model: &str) -> Self {
        let place = Self::new();
        place.write("model.toml", model);
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.file(name), content).unwrap_or_else(|error| panic!("cannot write {name}: {error}"));
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.file(name)).unwrap_or_else(|error| panic!("cannot read {name}: {error}"))
    }

    /// Starts the program here.
    pub(crate) fn start<S: AsRef<str>>(&self, arguments: &[S]) -> Running {
        Running::start(self.path(), arguments)
    }

    /// Runs the program here to its end.
    pub(crate) fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Ended {
        self.start(arguments).end()
    }

    /// Runs the program here, which must succeed. Returns what it printed.
    pub(crate) fn succeed<S: AsRef<str>>(&self, arguments: &[S]) -> String {
        self.run(arguments).expect_code(0).stdout
    }

    /// Trains `model.toml` for `rounds` rounds into the directory `out`. Returns the summary.
    pub(crate) fn train(&self, out: &str, rounds: u32, more: &[&str]) -> Value {
        self.succeed(&train_arguments(out, rounds, more));
        self.summary(out)
    }

    /// Starts a coordinator with the same settings, on a free port. Returns it when it listens, and its URL.
    pub(crate) fn coordinator(&self, out: &str, rounds: u32, more: &[&str]) -> (Running, String) {
        self.coordinator_with(out, rounds, more, &[])
    }

    /// The same, on this address and port.
    pub(crate) fn coordinator_at(&self, listen: &str, out: &str, rounds: u32, more: &[&str]) -> (Running, String) {
        let mut arguments = quick_arguments(out, rounds);
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        self.listening_at(listen, &arguments, &[])
    }

    /// Starts a coordinator with the same settings and `more` arguments and variables. Returns it when it listens, and
    /// its URL.
    pub(crate) fn coordinator_with(
        &self,
        out: &str,
        rounds: u32,
        more: &[&str],
        variables: &[(&str, &str)],
    ) -> (Running, String) {
        let mut arguments = quick_arguments(out, rounds);
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        self.listening(&arguments, variables)
    }

    /// Starts a coordinator that goes on with a run, on a free port. Returns it when it listens, and its URL.
    pub(crate) fn coordinator_again(&self, out: &str, more: &[&str]) -> (Running, String) {
        let arguments: Vec<String> = [&["--resume", out], more].concat().into_iter().map(str::to_owned).collect();
        self.listening(&arguments, &[])
    }

    fn listening(&self, arguments: &[String], variables: &[(&str, &str)]) -> (Running, String) {
        self.listening_at("127.0.0.1:0", arguments, variables)
    }

    fn listening_at(&self, listen: &str, arguments: &[String], variables: &[(&str, &str)]) -> (Running, String) {
        let listen = ["coordinator", "--listen", listen].map(str::to_owned);
        let mut coordinator = Running::start_with(self.path(), &[&listen[..], arguments].concat(), variables);
        let line = coordinator.wait_for_line("lockstep worker --coordinator ");
        let url = line.rsplit(' ').next().expect("an address at the end of the line").to_owned();
        assert!(url.contains("://127.0.0.1:"), "{line}");
        (coordinator, url)
    }

    /// Starts a worker with one thread.
    pub(crate) fn worker(&self, url: &str, name: &str) -> Running {
        self.start(&["worker", "--coordinator", url, "--name", name, "--threads", "1"])
    }

    /// The `summary.json` of a run.
    pub(crate) fn summary(&self, out: &str) -> Value {
        serde_json::from_str(&self.read(&format!("{out}/summary.json"))).expect("summary.json is JSON")
    }

    /// The lines of a JSON-lines file.
    pub(crate) fn json_lines(&self, name: &str) -> Vec<Value> {
        parse_lines(&self.read(name))
    }

    /// Has the program prove a run from its files.
    pub(crate) fn audit(&self, out: &str) -> String {
        self.succeed(&["audit", out])
    }
}

/// `train` with the settings that are quick.
pub(crate) fn train_arguments(out: &str, rounds: u32, more: &[&str]) -> Vec<String> {
    let more = more.iter().map(|&word| word.to_owned()).collect();
    // With --json no PCA is computed.
    [vec!["train".to_owned(), "--json".to_owned()], quick_arguments(out, rounds), more].concat()
}

fn quick_arguments(out: &str, rounds: u32) -> Vec<String> {
    let rounds = rounds.to_string();
    let own = ["--model", "model.toml", "--name", "quick", "--out", out, "--max-rounds", &rounds];
    own.iter().chain(&QUICK).map(|&word| word.to_owned()).collect()
}

/// Every line as JSON.
pub(crate) fn parse_lines(text: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
    text.lines().map(parse).collect()
}

/// A run's hash, from its summary.
pub(crate) fn hash(summary: &Value) -> String {
    let hash = summary["params_sha256"].as_str().expect("params_sha256 is a string").to_owned();
    assert_eq!(hash.len(), 64, "{hash}");
    hash
}

/// The numbers of the rounds among events.
pub(crate) fn rounds_of(events: &[Value]) -> Vec<u64> {
    let rounds = events.iter().filter(|event| event["event"] == "round");
    rounds.map(|event| event["round"].as_u64().expect("a round's number")).collect()
}
