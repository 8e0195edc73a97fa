//! Disks that are full or read-only while a run goes on. Needs the right to mount; says so and does nothing without it.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use lockstep_coordinator::resume;
use support::{Place, Running, TINY, hash};

const ROUNDS: u32 = 1500;

/// Something mounted, until it is dropped.
struct Mount(PathBuf);

impl Mount {
    /// `None` if mounting is not permitted.
    fn new(at: PathBuf, arguments: &[&str]) -> Option<Self> {
        let mounted = Command::new("mount").args(arguments).arg(&at).stderr(Stdio::null()).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(at));
        }
        println!("not tested: mounting needs root and the right to it");
        None
    }

    fn set(&self, options: &str) {
        let status = Command::new("mount").args(["-o", options]).arg(&self.0).status().expect("mount starts");
        assert!(status.success(), "mount -o {options}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Takes all room on a disk, and what becomes free of it, until it is dropped.
struct Filler {
    file: PathBuf,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    fn new(file: PathBuf) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (mut out, end) = (File::create(&file).expect("a file"), done.clone());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                if out.write_all(&[0; 4096]).is_err() {
                    std::thread::yield_now();
                }
            }
        });
        Self { file, done, thread: Some(thread) }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A run on a disk of its own, in the middle.
struct Scene {
    // Processes end before the disk goes, and the disk before its place.
    coordinator: Running,
    workers: Vec<Running>,
    url: String,
    expected: String,
    disk: Mount,
    place: Place,
}

impl Scene {
    fn new() -> Option<Self> {
        Self::with(ROUNDS, ROUNDS, &[])
    }

    /// With `more` options; `expected` is the hash after so many rounds.
    fn with(rounds: u32, expected_after: u32, more: &[&str]) -> Option<Self> {
        let place = Place::with_model(TINY);
        std::fs::create_dir(place.file("disk")).expect("a directory");
        let disk = Mount::new(place.file("disk"), &["-t", "tmpfs", "-o", "size=16m", "tmpfs"])?;
        let expected = hash(&place.train("calm", expected_after, more));
        let often = ["--set", "checkpoint.every_rounds=7", "--min-workers", "2", "--json"];
        let (mut coordinator, url) = place.coordinator("disk/run", rounds, &[&often, more].concat());
        let workers = ["a", "b"].map(|name| place.worker(&url, name)).into();
        coordinator.wait_for_line("\"round\":30,");
        Some(Self { coordinator, workers, url, expected, disk, place })
    }

    fn run_directory(&self) -> PathBuf {
        self.place.file("disk/run")
    }

    /// The run still goes on: rounds are completed.
    fn sees_rounds(&mut self) {
        (0..3).for_each(|_| drop(self.coordinator.wait_for_line("\"event\":\"round\"")));
    }

    /// One of two workers is killed, so that the run waits: nothing changes while a test looks.
    fn pause(&mut self) {
        self.workers.pop().expect("two workers").kill();
        self.coordinator.wait_for_line("needs 2 workers");
    }

    fn monitor_shows(&self, problem: &str) {
        self.place.start(&["monitor", &self.url]).wait_for_line(problem);
    }

    /// The run goes on with another worker, and ends as if nothing had been.
    fn finish<const N: usize>(mut self, awaited: [&str; N]) {
        self.workers.push(self.place.worker(&self.url, "c"));
        let Self { mut coordinator, workers, expected, place, .. } = self;
        coordinator.wait_for_lines(awaited);
        coordinator.end().expect_code(0);
        workers.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
        assert_eq!(hash(&place.summary("disk/run")), expected);
        let proof = place.audit("disk/run");
        assert!(proof.contains("run quick: 1,500 rounds, "), "{proof}");
    }
}

/// Rounds after which the newest checkpoint was taken; nothing there is damaged.
fn newest_whole(run: &Path) -> u64 {
    let found = resume::find(run).expect("checkpoints");
    assert_eq!(found.damaged, Vec::<String>::new());
    found.checkpoint.expect("a whole checkpoint").state.standing.rounds
}

/// Scenario: the disk gets full while a run goes on, and has room again later. Property: rounds go on; log and monitor say
/// what is wrong; the checkpoints that are there stay whole; then the ledger is written without a gap, and the result is
/// that of a run that nothing happened to.
#[test]
fn a_full_disk_stops_no_round_and_harms_no_checkpoint() {
    let Some(mut scene) = Scene::new() else { return };
    let before = newest_whole(&scene.run_directory());
    let filler = Filler::new(scene.place.file("disk/filler"));
    let failures = ["ledger.jsonl: No space left on device", "cannot write a checkpoint: "];
    let [ledger, checkpoint] = scene.coordinator.wait_for_lines(failures);
    assert!(ledger.contains("training goes on, its lines wait in memory"), "{ledger}");
    assert!(checkpoint.contains("the newest one is from after round"), "{checkpoint}");
    scene.sees_rounds();
    scene.pause();
    scene.monitor_shows("problem: cannot write ");
    assert!(newest_whole(&scene.run_directory()) >= before);
    drop(filler);
    scene.finish(["ledger.jsonl is written again; nothing is missing in it", "checkpoints are written again"]);
}

/// Scenario: the disk is full and stays so, until more of the ledger waits than may: 64 MiB. Property: the run is stopped,
/// because a round that is not in the ledger is not proven, and says so, and how to go on; its workers end well; the last
/// checkpoint is whole. When the disk has room again, the run goes on from there, and ends as if nothing had been.
#[test]
fn a_disk_that_stays_full_stops_the_run() {
    // The record of a round has a digest for each shard: here, some hundred rounds are enough.
    let wide = ["--set", "shards=4096", "--set", "batch_size=4096", "--epochs", "1000"];
    // The disk has no room for more than 120 of them: the newest checkpoint is older than the hash.
    let Some(scene) = Scene::with(3000, 150, &wide) else { return };
    let run = scene.run_directory();
    let filler = Filler::new(scene.place.file("disk/filler"));
    let Scene { coordinator, workers, expected, place, disk, .. } = scene;
    let said = coordinator.end().expect_code(1).stderr;
    let stopped = "bytes wait for it, more than the 67108864 that may: a round that is not in the ledger is not proven; \
                   to go on: lockstep coordinator --resume disk/run (from its newest checkpoint, after round ";
    assert!(said.contains("error: stopped after ") && said.contains(stopped), "{said}");
    assert!(said.contains("; and cannot write disk/run/model.safetensors: No space left on device"), "{said}");
    workers.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    assert!(newest_whole(&run) < 150);
    drop(filler);
    disk.set("remount,size=64m");
    place.succeed(&["train", "--json", "--resume", "disk/run", "--max-rounds", "150"]);
    assert_eq!(hash(&place.summary("disk/run")), expected);
    let proof = place.audit("disk/run");
    assert!(proof.contains("run quick: 150 rounds, "), "{proof}");
}

/// Scenario: the run's directory becomes read-only while a run goes on, and writable again later. Property: as in the first
/// test; what is open is written all the same. (The whole file system cannot become read-only: the system refuses that while
/// the ledger is open.)
#[test]
fn a_read_only_directory_stops_no_round_and_harms_no_checkpoint() {
    let Some(mut scene) = Scene::new() else { return };
    let run = scene.run_directory();
    let itself = run.display().to_string();
    let Some(mount) = Mount::new(run.clone(), &["--bind", &itself]) else { return };
    mount.set("remount,bind,ro");
    scene.coordinator.wait_for_line("cannot write a checkpoint: ");
    scene.sees_rounds();
    scene.pause();
    scene.monitor_shows("Read-only file system");
    newest_whole(&run);
    mount.set("remount,bind,rw");
    drop(mount);
    scene.finish(["checkpoints are written again"]);
}

/// Scenario: a run is to begin on a read-only disk. Property: it does not, and says why.
#[test]
fn a_run_does_not_begin_on_a_read_only_disk() {
    let place = Place::with_model(TINY);
    std::fs::create_dir(place.file("disk")).expect("a directory");
    let Some(_disk) = Mount::new(place.file("disk"), &["-t", "tmpfs", "-o", "ro", "tmpfs"]) else { return };
    let said = place.run(&support::train_arguments("disk/run", 5, &[])).expect_code(1).stderr;
    assert!(said.contains("Read-only file system") && said.contains("disk/run"), "{said}");
}
