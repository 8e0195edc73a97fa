//! Runs that are killed or stopped, and go on: the result is that of a run that was not.

mod support;

use std::fs;

use serde_json::Value;
use support::{Place, Running, TINY, hash, parse_lines, rounds_of};

/// Rounds of a run: two epochs of 155 and the better half of a third, each with its evaluation.
const ROUNDS: u32 = 400;

const OFTEN: [&str; 2] = ["--set", "checkpoint.every_rounds=7"];
const NEVER: [&str; 2] = ["--set", "checkpoint.every_seconds=0"];

/// The summary of a run of so many rounds that nothing happens to.
fn calm(place: &Place, rounds: u32) -> Value {
    place.train(&format!("calm-{rounds}"), rounds, &[])
}

/// Begins to train into `run`.
fn begin(place: &Place, rounds: u32, more: &[&str]) -> Running {
    place.start(&support::train_arguments("run", rounds, more))
}

/// Goes on with `run`.
fn resume(place: &Place, more: &[&str]) -> Running {
    place.start(&[&["train", "--json", "--resume", "run"], more].concat())
}

/// Lets a run get to a round, and kills it with its workers.
fn kill_at(mut run: Running, round: u32) {
    run.wait_for_line(&format!("\"round\":{round},"));
    run.kill_all();
}

/// Checks that `run` is what `calm` is, and that its files say so: every round once, and the whole proof.
fn check_same(place: &Place, calm: &Value) {
    let summary = place.summary("run");
    assert_eq!(hash(&summary), hash(calm));
    for key in ["rounds", "epochs", "samples_seen", "train_loss", "val_loss", "outcome"] {
        assert_eq!(summary[key], calm[key], "{key}");
    }
    let rounds = calm["rounds"].as_u64().expect("rounds");
    assert_eq!(rounds_of(&place.json_lines("run/events.jsonl")), (0..rounds).collect::<Vec<u64>>());
    assert!(place.audit("run").contains(&format!("{rounds} rounds, ")), "the whole run is proven");
}

/// The checkpoints of `run`, the oldest first.
fn checkpoints(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.file("run/checkpoints")).expect("checkpoints");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".checkpoint")).collect();
    names.sort_unstable();
    names
}

/// Scenario: a run is killed in its first, second and third epoch, and goes on each time with other workers and threads.
#[test]
fn a_killed_run_goes_on_with_any_workers() {
    let place = Place::with_model(TINY);
    let calm = calm(&place, ROUNDS);
    kill_at(begin(&place, ROUNDS, &OFTEN), 20);
    kill_at(resume(&place, &["--workers", "2"]), 170);
    kill_at(resume(&place, &["--threads", "1", "--simd", "scalar"]), 320);
    resume(&place, &["--workers", "3"]).end().expect_code(0);
    check_same(&place, &calm);
    assert!(place.summary("run")["workers_seen"].as_u64() > Some(3), "workers are counted over the whole run");
    assert_eq!(checkpoints(&place).len(), 3, "the last three are kept");
}

/// Scenario: a run is killed before it has a checkpoint. Property: it starts again, and says so.
#[test]
fn a_run_killed_before_its_first_checkpoint_starts_again() {
    let place = Place::with_model(TINY);
    let calm = calm(&place, ROUNDS);
    kill_at(begin(&place, ROUNDS, &NEVER), 20);
    let said = resume(&place, &[]).end().expect_code(0).stderr;
    assert!(said.contains("run has no checkpoint to go on from: the run starts with its first round again"), "{said}");
    check_same(&place, &calm);
}

/// Scenario: the coordinator is killed while two workers compute for it, and started again at the same address.
/// Property: the workers come back by themselves, under numbers that were never used.
#[test]
fn workers_find_a_restarted_coordinator() {
    let place = Place::with_model(TINY);
    let calm = calm(&place, ROUNDS);
    // On a slow disk, checkpoints are left out; at the end of a run, never.
    begin(&place, 50, &OFTEN).end().expect_code(0);
    let more = ["--max-rounds", &ROUNDS.to_string(), "--json", "--start-workers", "2"];
    let (mut coordinator, url) = place.coordinator_again("run", &more);
    let workers = ["a", "b"].map(|name| place.worker(&url, name));
    coordinator.wait_for_line("\"round\":200,");
    coordinator.kill();
    let address = url.trim_start_matches("http://");
    let again = place.start(&["coordinator", "--resume", "run", "--listen", address, "--min-workers", "2"]);
    let said = again.end().expect_code(0).stderr;
    assert!(said.contains("going on with run after round "), "{said}");
    for worker in workers {
        let said = worker.end().expect_code(0).stderr;
        assert!(said.contains("looking for the coordinator") && said.contains("#2001"), "{said}");
    }
    check_same(&place, &calm);
    let proof = place.audit("run");
    let members = ["w1#1,", "w2#1001", "w3#1001", "w2#2001", "w3#2001"];
    assert!(members.iter().all(|member| proof.contains(member)), "{proof}");
    assert_eq!(place.summary("run")["workers_seen"], 3);
}

/// Scenario: the coordinator was killed when its run was complete, but before it dismissed its workers; it is started again,
/// and one of them finds it. Property: the worker hears that the run has ended, and both end well.
#[test]
fn a_late_worker_hears_that_the_run_has_ended() {
    let place = Place::with_model(TINY);
    let calm = calm(&place, 30);
    begin(&place, 30, &[]).end().expect_code(0);
    let (mut coordinator, url) = place.coordinator_again("run", &[]);
    // All that it says; from here on, it only waits.
    coordinator.wait_for_line("model       ");
    let late = place.start(&["worker", "--coordinator", &url, "--name", "late", "--patience", "3"]);
    let said = late.end().expect_code(0).stderr;
    assert!(said.contains("the run has ended"), "{said}");
    coordinator.end().expect_code(0);
    check_same(&place, &calm);
}

/// Scenario: a run is asked to terminate. Property: it says how to go on, and goes on with the very next round.
#[test]
fn a_terminated_run_loses_no_round() {
    let place = Place::with_model(TINY);
    let calm = calm(&place, ROUNDS);
    let mut run = begin(&place, ROUNDS, &NEVER);
    run.wait_for_line("\"round\":160,");
    run.terminate();
    let said = run.end().expect_code(1).stderr;
    assert!(said.contains("; to go on: lockstep train --resume run\n"), "{said}");
    let stopped = place.summary("run");
    assert_eq!(stopped["outcome"], "stopped");
    place.audit("run");
    let events = parse_lines(&resume(&place, &["--workers", "2"]).end().expect_code(0).stdout);
    assert_eq!(rounds_of(&events).first(), stopped["rounds"].as_u64().as_ref());
    check_same(&place, &calm);
}

/// Scenario: a finished run is resumed with more rounds, from the middle of an epoch, and then with more epochs.
#[test]
fn a_finished_run_can_be_extended() {
    let place = Place::with_model(TINY);
    begin(&place, 200, &["--epochs", "2"]).end().expect_code(0);
    resume(&place, &["--max-rounds", "300"]).end().expect_code(0);
    check_same(&place, &calm(&place, 300));
    resume(&place, &["--max-rounds", "400", "--epochs", "3"]).end().expect_code(0);
    check_same(&place, &calm(&place, 400));
    // What is finished already ends at once, without anybody joining.
    place.run(&["coordinator", "--resume", "run", "--listen", "127.0.0.1:0"]).expect_code(0);
    check_same(&place, &place.summary("calm-400"));
}

/// Scenario: the newest checkpoint has a wrong bit, the one before is cut off, and the ledger has a torn line. Property:
/// the third is used, with a message for each.
#[test]
fn damaged_checkpoints_are_passed_over() {
    let place = Place::with_model(TINY);
    let calm = calm(&place, ROUNDS);
    // On a slow disk, checkpoints are left out; at the end of a run, never.
    begin(&place, 30, &OFTEN).end().expect_code(0);
    for rounds in ["60", "100"] {
        resume(&place, &["--max-rounds", rounds]).end().expect_code(0);
    }
    let names = checkpoints(&place);
    let path = |at: usize| place.file(&format!("run/checkpoints/{}", names[at]));
    let mut newest = fs::read(path(2)).expect("the newest");
    newest[5000] ^= 4;
    fs::write(path(2), newest).expect("a wrong bit");
    let before = fs::read(path(1)).expect("the one before");
    fs::write(path(1), &before[..before.len() / 2]).expect("cut off");
    place.write("run/ledger.jsonl", format!("{}{{\"chain\":\"01", place.read("run/ledger.jsonl")));
    let said = resume(&place, &["--max-rounds", "400"]).end().expect_code(0).stderr;
    for damaged in [1, 2] {
        let message = format!("{} is passed over: it is damaged: ", names[damaged]);
        assert!(said.contains(&message), "{message:?} is not in {said}");
    }
    let oldest: u32 = names[0]["round-".len()..].trim_end_matches(".checkpoint").parse().expect("a number");
    assert!(said.contains(&format!("going on with run after round {oldest}")), "{said}");
    check_same(&place, &calm);
    assert!(place.file("run/checkpoints").join(names[2].replace(".checkpoint", ".damaged")).exists());
}

/// Scenario: the ledger was shortened. Property: only a checkpoint whose ledger is there is used; without one the run is
/// not resumed, and nothing is changed.
#[test]
fn a_checkpoint_without_its_ledger_is_not_used() {
    let place = Place::with_model(TINY);
    begin(&place, 98, &[]).end().expect_code(0);
    resume(&place, &["--max-rounds", "100"]).end().expect_code(0);
    let ledger = place.read("run/ledger.jsonl");
    let line = |count: usize| ledger.lines().take(count).map(|line| format!("{line}\n")).collect::<String>();
    // The header and 99 rounds: the checkpoint of the end is too new.
    place.write("run/ledger.jsonl", line(100));
    let said = resume(&place, &[]).end().expect_code(0).stderr;
    assert!(said.contains("-0000000100.checkpoint is passed over: run/ledger.jsonl: it has "), "{said}");
    place.audit("run");

    place.write("run/ledger.jsonl", line(30));
    let said = resume(&place, &[]).end().expect_code(1).stderr;
    assert!(said.contains("no checkpoint can be used: run/ledger.jsonl: it has "), "{said}");
    assert_eq!(place.read("run/ledger.jsonl"), line(30));
}

/// Scenario: a run is to go on as another one. Property: each change is refused with the key and both values, and the
/// files stay as they are.
#[test]
fn what_is_part_of_the_mathematics_cannot_change() {
    let place = Place::with_model(TINY);
    begin(&place, 20, &[]).end().expect_code(0);
    let ledger = place.read("run/ledger.jsonl");
    let check = |options: &[&str], expected: &str| {
        let said = resume(&place, options).end().expect_code(2).stderr;
        assert!(said.contains(expected), "{expected:?} is not in {said}");
        assert_eq!(place.read("run/ledger.jsonl"), ledger);
    };
    check(&["--seed", "8"], "seed was 7 when the run began and is 8 now");
    check(&["--batch-size", "32"], "batch_size was 64 when the run began and is 32 now");
    check(&["--learning-rate", "0.5"], "optimizer.learning_rate was 0.001 when the run began and is 0.5 now");
    check(&["--compute", "bf16"], "precision.compute was \"f32\" when the run began and is \"bf16\" now");
    check(&["--preset", "dense"], "model.");
    check(&["--max-rounds", "19"], "20 rounds are done, and epochs and max_rounds would end the run after 19");
    check(&["--out", "elsewhere"], "cannot be used with");
    let said = place.run(&["train", "--resume", "nowhere"]).expect_code(2).stderr;
    assert!(said.contains("there is no run in nowhere"), "{said}");
}

/// Scenario: a run in bfloat16 is killed, and is to go on. Property: it does, in bfloat16, without being told; and in no
/// other precision, whether it has a checkpoint or only a ledger.
#[test]
fn a_run_keeps_its_precision() {
    const BF16: [&str; 2] = ["--compute", "bf16"];
    let place = Place::with_model(TINY);
    let calm = place.train("calm", 60, &BF16);
    begin(&place, 30, &BF16).end().expect_code(0);
    let refused = |options: &[&str], expected: &str| {
        let said = place.run(options).expect_code(2).stderr;
        assert!(said.contains(expected), "{expected:?} is not in {said}");
    };
    let changed = "precision.compute was \"bf16\" when the run began and is \"f32\" now";
    refused(&["train", "--resume", "run", "--compute", "f32"], changed);
    let changed_order = "precision.compute was \"bf16\" when the run began and is \"bf16-amx\" now";
    refused(&["train", "--resume", "run", "--compute", "bf16-amx"], changed_order);
    // Whoever says the same options each time must say this one, too.
    let again = support::train_arguments("run", 60, &["--auto-resume"]);
    refused(&again.iter().map(String::as_str).collect::<Vec<_>>(), changed);
    resume(&place, &["--max-rounds", "60"]).end().expect_code(0);
    check_same(&place, &calm);

    fs::remove_dir_all(place.file("run/checkpoints")).expect("checkpoints");
    let config = place.read("run/run.toml");
    assert!(config.contains("compute = \"bf16\""), "{config}");
    place.write("run/run.toml", config.replace("compute = \"bf16\"", "compute = \"f32\""));
    refused(&["train", "--resume", "run"], "run/ledger.jsonl is of another run: it begins with ");
}

/// Scenario: the file with the samples is changed between a stop and a restart.
#[test]
fn changed_data_are_refused() {
    let place = Place::new();
    place.write(
        "model.toml",
        "name = \"small\"\ninput = [4]\nencoder = [{ layer = \"dense\", units = 2 }]\ndecoder = [{ layer = \"dense\", units = 4 }]",
    );
    let samples = |last: u8| {
        let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (640, 4), }";
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        let padded = format!("{header:<117}\n");
        file.extend((padded.len() as u16).to_le_bytes());
        file.extend(padded.as_bytes());
        file.extend((0..640u32 * 4).map(|i| (i * 7 % 251) as u8));
        *file.last_mut().expect("samples") = last;
        file
    };
    place.write("data.npy", samples(1));
    begin(&place, 10, &["--data", "data.npy"]).end().expect_code(0);
    place.write("data.npy", samples(2));
    let said = resume(&place, &["--max-rounds", "12"]).end().expect_code(2).stderr;
    assert!(said.contains("the data have changed since the run began"), "{said}");
    // The same samples may lie elsewhere.
    place.write("moved.npy", samples(1));
    resume(&place, &["--max-rounds", "12", "--data", "moved.npy"]).end().expect_code(0);
}

/// Scenario: a run is resumed while it still goes on. Property: it is refused, and the first is not disturbed.
#[test]
fn a_run_that_is_going_on_cannot_be_resumed() {
    let place = Place::with_model(TINY);
    let (coordinator, url) = place.coordinator("run", 20, &[]);
    let said = place.run(&["coordinator", "--resume", "run", "--listen", "127.0.0.1:0"]).expect_code(1).stderr;
    assert!(said.contains("ledger.jsonl is being written by another process: the run is still going on"), "{said}");
    place.worker(&url, "a").end().expect_code(0);
    coordinator.end().expect_code(0);
    place.audit("run");
}

/// Scenario: checkpoints cannot be written, and then can. Property: training goes on, the monitor names the problem while
/// it lasts, and its end is told.
#[test]
fn a_checkpoint_that_cannot_be_written_is_a_notice_and_is_tried_again() {
    let place = Place::with_model(TINY);
    let often = ["--set", "checkpoint.every_rounds=1"];
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &[&often[..], &["--min-workers", "2"]].concat());
    // A file is in the place of the directory.
    place.write("run/checkpoints", "");
    let mut holder = support::FakeWorker::join(&url, 1);
    let first = place.worker(&url, "first");
    holder.next_assignment();
    drop(holder);
    // Round 0 is completed by the one that is left; then the run waits for another.
    let notice = coordinator.wait_for_line("notice: cannot write a checkpoint");
    assert!(notice.contains("there is none yet, it is tried again"), "{notice}");
    let mut monitor = place.start(&["monitor", &url]);
    monitor.wait_for_line("problem: cannot write a checkpoint");
    fs::remove_file(place.file("run/checkpoints")).expect("the file in the way");
    let second = place.worker(&url, "second");
    coordinator.wait_for_line("notice: checkpoints are written again");
    coordinator.end().expect_code(0);
    [first, second].into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    assert_eq!(checkpoints(&place).last().map(String::as_str), Some("round-0000000400.checkpoint"));
    place.audit("run");
}

/// Scenario: the run's directory is removed while the run goes on. Property: the ledger comes back whole, and the run
/// ends with all of its files.
#[test]
fn a_removed_directory_comes_back() {
    let place = Place::with_model(TINY);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "2"]);
    let mut holder = support::FakeWorker::join(&url, 1);
    let first = place.worker(&url, "first");
    holder.next_assignment();
    drop(holder);
    coordinator.wait_for_line("waiting: round 1 needs 2 workers");
    fs::remove_dir_all(place.file("run")).expect("the run's directory");
    let second = place.worker(&url, "second");
    coordinator.end().expect_code(0);
    [first, second].into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    let proof = place.audit("run");
    assert!(proof.contains("400 rounds, ") && proof.contains("summary.json agrees"), "{proof}");
    // Its configuration is in the checkpoint.
    assert!(!place.file("run/run.toml").exists());
    resume(&place, &["--max-rounds", "410"]).end().expect_code(0);
    assert!(place.audit("run").contains("410 rounds, "));
}
