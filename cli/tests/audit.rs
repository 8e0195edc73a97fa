//! `lockstep audit` proves an honest run, and finds what was changed afterwards.

mod support;

use std::collections::BTreeSet;
use std::fs;

use lockstep_common::hash::Digest;
use lockstep_common::ledger::{Chain, Header, Record, parse_line};
use support::{Place, TINY, hash};

/// Rounds of the run: one epoch of four rounds and a part of the next.
const ROUNDS: u32 = 5;

const LEDGER: &str = "run/ledger.jsonl";

/// A run of 1,000 samples in batches of 300 by two workers: epochs of 4 rounds.
fn honest_run() -> Place {
    let place = Place::with_model(TINY);
    let mut samples = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000, 28, 28), }";
    samples.extend(format!("{header:117}\n").bytes());
    samples.extend((0..1000 * 784).map(|i| (i * 13 % 251) as u8));
    place.write("samples.npy", samples);
    place.train(
        "run",
        ROUNDS,
        &["--data", "samples.npy", "--validation", "samples.npy", "--batch-size", "300", "--workers", "2"],
    );
    place
}

#[test]
fn an_honest_run_is_proven() {
    let place = honest_run();
    let text = place.audit("run");
    for expected in [
        "run quick: 5 rounds, 1,300 samples used",
        "every one of the 1,000 samples was used exactly once in the first epoch",
        "epoch 2 is not complete: 300 of 1,000 samples were used, each once",
        "each of its 16 leaves stands in it once",
        "model.safetensors is what the last round made",
        "summary.json agrees",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&place.succeed(&["audit", "run", "--json"])).expect("a proof is JSON");
    assert_eq!((&json["rounds"], &json["samples_used"], &json["whole_epochs"]), (&5.into(), &1300.into(), &1.into()));
    assert_eq!(json["params_sha256"], place.summary("run")["params_sha256"]);
    // Who was fast enough for a part of it is a matter of luck; the ledger says who was.
    let members: BTreeSet<String> =
        records(&place).iter().flat_map(|record| &record.nodes).map(|node| node.by.to_string()).collect();
    let named: Vec<String> = serde_json::from_value(json["members"].clone()).expect("names");
    assert_eq!(named.iter().cloned().collect::<BTreeSet<_>>(), members);
    assert_eq!(named.len(), members.len());
    assert!(named.iter().all(|name| ["w1#1", "w2#1"].contains(&name.as_str())), "{named:?}");
    assert!(text.contains("computed by ") && text.contains(&named.join(", ")), "{named:?} are not in {text}");
}

/// The rounds of the run's ledger.
fn records(place: &Place) -> Vec<Record> {
    let ledger = place.read(LEDGER);
    let mut lines = ledger.lines();
    let mut chain = Digest::of(lines.next().expect("a header").as_bytes());
    lines.map(|line| parse_line(line, &mut chain).expect("an honest line")).collect()
}

/// Checks that the audit fails and says `expected` after `spoil` has changed the run's ledger.
fn check(place: &Place, expected: &str, spoil: impl FnOnce(&mut Vec<String>)) {
    let honest = place.read(LEDGER);
    let mut lines: Vec<String> = honest.lines().map(str::to_owned).collect();
    assert_eq!(lines.len() as u32, 1 + ROUNDS);
    spoil(&mut lines);
    place.write(LEDGER, lines.join("\n"));
    let message = place.run(&["audit", "run"]).expect_code(1).stderr;
    assert!(message.contains("ledger.jsonl") || message.contains("in the ledger"), "{message}");
    assert!(message.contains(expected), "{expected:?} is not in {message}");
    place.write(LEDGER, honest);
}

/// Puts a changed record into a ledger and makes all digests of the chain fit again, as a forger would.
fn forge(lines: &mut [String], round: usize, lie: impl FnOnce(&mut Record)) {
    let header: Header = serde_json::from_str(&lines[0]).expect("a header");
    let (mut forged, first) = Chain::start(&header);
    assert_eq!(first, lines[0], "a header's text is its own JSON");
    let mut chain = Digest::of(first.as_bytes());
    let mut lie = Some(lie);
    for (number, line) in lines[1..].iter_mut().enumerate() {
        let mut record = parse_line(line, &mut chain).expect("an honest line");
        if let Some(lie) = lie.take_if(|_| number == round) {
            lie(&mut record);
        }
        *line = forged.line(&record);
    }
}

#[test]
fn what_was_changed_is_found_and_named() {
    let place = honest_run();
    // Somebody edits the file.
    check(&place, "ledger line 4: chain digest", |lines| {
        lines[3] = lines[3].replace("\"samples\":300", "\"samples\":3")
    });
    check(&place, "ledger line 3: chain digest", |lines| drop(lines.remove(2)));
    check(&place, "ledger line 2: chain digest", |lines| lines.swap(1, 2));
    check(&place, "ledger line 7: chain digest", |lines| lines.push(lines[5].clone()));
    check(&place, "ledger line 2: chain digest", |lines| lines[0] = lines[0].replace("\"seed\":7", "\"seed\":8"));
    check(&place, "ledger line 6: ", |lines| {
        let half = lines[5].len() / 2;
        lines[5].truncate(half);
    });
    check(&place, "number of rounds is 5, but 4", |lines| drop(lines.pop()));
    check(&place, "ledger line 1: ", |lines| drop(lines.remove(0)));
    // Somebody knows how the chain is made.
    check(&place, "ledger line 3: round 1: leaf 2 was computed from other samples", |lines| {
        forge(lines, 1, |record| record.leaves.swap(2, 3));
    });
    check(&place, "ledger line 4: round 2 used 299 samples, the batch has 300", |lines| {
        forge(lines, 2, |record| record.samples -= 1);
    });
    let first = &records(&place)[0].nodes;
    let covered: u32 = first[..first.len() - 1].iter().map(|part| part.node.leaves().len() as u32).sum();
    check(&place, &format!("ledger line 2: round 0: nodes cover {covered} of 16 leaves"), |lines| {
        forge(lines, 0, |record| record.nodes.truncate(record.nodes.len() - 1));
    });
    check(&place, "model.safetensors: digest of the parameters", |lines| {
        forge(lines, 4, |record| record.parameters = Digest(1));
    });
    place.audit("run");
}

#[test]
fn a_swapped_model_or_summary_is_found() {
    let place = honest_run();
    let other = place.train("other", ROUNDS, &["--seed", "8"]);
    let honest = fs::read(place.file("run/model.safetensors")).expect("a model");
    fs::copy(place.file("other/model.safetensors"), place.file("run/model.safetensors")).expect("a copy");
    let message = place.run(&["audit", "run"]).expect_code(1).stderr;
    assert!(message.contains("run/model.safetensors: digest of the parameters is "), "{message}");
    place.write("run/model.safetensors", &honest);

    let summary = place.read("run/summary.json");
    let forged = summary.replace(&hash(&place.summary("run")), &hash(&other));
    place.write("run/summary.json", forged);
    let message = place.run(&["audit", "run"]).expect_code(1).stderr;
    assert!(message.contains("run/summary.json: params_sha256 is ") && message.contains(&hash(&other)), "{message}");
    place.write("run/summary.json", summary);
    place.audit("run");
}

#[test]
fn without_a_ledger_nothing_is_proven() {
    let place = honest_run();
    fs::remove_file(place.file(LEDGER)).expect("a ledger");
    let message = place.run(&["audit", "run"]).expect_code(2).stderr;
    assert!(message.contains("run/ledger.jsonl"), "{message}");
    let message = place.run(&["audit", "no-such-run"]).expect_code(2).stderr;
    assert!(message.contains("no-such-run/ledger.jsonl"), "{message}");
}
