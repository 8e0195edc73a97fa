//! Scenario: the real state machine in a simulated world. Workers are started, crash, are started again, freeze, are cut
//! off, become slow, get stuck, drain; the coordinator is killed and goes on from its newest whole checkpoint, if there is
//! one; messages are delayed, overtake those of other connections, and are repeated; all of it drawn from one seed.
//!
//! Property: every run ends with the one right hash and a ledger that an audit proves, and no wait is longer than it is
//! allowed to be. A seed that failed is pinned below. `LOCKSTEP_SOAK_SEEDS=100000 cargo test -p lockstep-coordinator
//! --test simulation soak` runs as many other seeds.

mod restart;
mod worker;
mod world;

use std::time::Duration;

use lockstep_common::ledger::audit;
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shard::MAX_SAMPLES;
use lockstep_coordinator::round::Outcome;
use world::{Fault, Happening, World, right_parameters, spec};

/// Seeds that every `cargo test` runs.
const SEEDS: u64 = 2000;

/// How long things go wrong; then there is calm, and the run must end.
const STORM: Duration = Duration::from_secs(4);

/// A run under a storm of faults, both made from the seed.
fn storm(seed: u64) -> World {
    let mut random = Stream::new(seed, Purpose::SelfTest, 0, 0);
    let shards = 1 << random.below(5);
    let min_workers = 1 + random.below(2.min(shards));
    let validated = random.below(2) == 0;
    let spot_check = [0, 1, 3, 16][random.below(4) as usize];
    let every_rounds = random.below(4);
    let mut spec = spec(shards, |config| {
        config.cluster.min_workers = min_workers;
        config.cluster.heartbeat_interval_ms = 100;
        config.cluster.lease_timeout_ms = 600;
        config.cluster.work_timeout_ms = 3000;
        config.cluster.spot_check = spot_check;
        config.checkpoint.every_rounds = every_rounds;
    });
    if !validated {
        spec.validation_samples = 0;
    }
    let mut world = World::new(spec, seed);
    world.stalls = true;
    let started = 1 + random.below(4);
    for _ in 0..started {
        let leaf_time = world.millis(10, 60);
        world.start(leaf_time);
    }
    for _ in 0..random.below(14) {
        let at = Duration::from_millis(u64::from(random.below(STORM.as_millis() as u32)));
        let process = 1 + u64::from(random.below(started + 3));
        let time = Duration::from_millis(u64::from(50 + random.below(2000)));
        let fault = match random.below(12) {
            0 => Fault::Crash(process),
            1 | 2 => Fault::Restart(process),
            3 => Fault::Freeze(process, time),
            4 => Fault::CutOff(process, time),
            5 => Fault::Slow(process, 2 + random.below(20)),
            6 => Fault::Stick(process),
            7 => Fault::Drain(process),
            8 => Fault::Start,
            9 | 10 => Fault::KillCoordinator { down: time, damage: random.below(4) == 0 },
            _ => Fault::Repeat,
        };
        world.after(at, Happening::Fault(fault));
    }
    world.kill_at_end = (random.below(3) == 0).then(|| Duration::from_millis(u64::from(250 + random.below(500))));
    // Whatever became of the others, these end the run.
    for _ in 0..min_workers {
        world.after(STORM, Happening::Fault(Fault::Start));
    }
    world.run();
    world
}

fn check(seed: u64) {
    let world = storm(seed);
    assert_eq!(world.outcome, Some(Outcome::Completed), "seed {seed}");
    assert_eq!(world.parameters, right_parameters(&world.spec), "seed {seed}: the hash is wrong");
    let proof = audit(world.records.as_bytes(), MAX_SAMPLES).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    assert_eq!((proof.rounds, proof.whole_epochs), (world.spec.total_rounds(), 2), "seed {seed}");
}

#[test]
fn every_storm_ends_with_the_right_hash() {
    (0..SEEDS).for_each(check);
}

/// Seeds that once failed.
#[test]
fn storms_that_were_survived_late() {
    // Two of three workers lived and answered nothing, and a check waited for one of them, again and again.
    // The fastest of three got stuck with all shards; the others waited longer for it in each round.
    [1953, 5249].into_iter().for_each(check);
}

#[test]
fn soak() {
    let seeds = std::env::var("LOCKSTEP_SOAK_SEEDS").map_or(0, |count| count.parse().expect("a number of seeds"));
    for seed in SEEDS..SEEDS + seeds {
        check(seed);
        if seed.is_multiple_of(10_000) {
            println!("seed {seed}");
        }
    }
}

/// A calm run with workers of these leaf times, in milliseconds; gives it and the median duration of its later rounds.
fn calm(leaf_times: &[u64], set: impl FnOnce(&mut World)) -> (World, Duration) {
    let workers = leaf_times.len() as u32;
    let spec = spec(16, |config| {
        config.epochs = 6;
        config.cluster.start_workers = workers;
    });
    let mut world = World::new(spec, 7);
    for &leaf_time in leaf_times {
        world.start(Duration::from_millis(leaf_time));
    }
    set(&mut world);
    world.run();
    let mut later: Vec<Duration> = world.rounds[8..].iter().map(|round| round.duration).collect();
    later.sort_unstable();
    let median = later[later.len() / 2];
    (world, median)
}

/// Scenario: one of three workers is ten times slower than the others from the start. Property: also the first rounds
/// take little longer than the other two would need alone, because its leaves are hedged; it is named; later rounds need
/// no hedging, because it has no leaves any more.
#[test]
fn a_slow_worker_costs_little() {
    let (_, alone) = calm(&[40, 40], |_| {});
    let (world, later) = calm(&[40, 400, 40], |_| {});
    assert!(later <= alone.mul_f64(1.05), "{later:?}, alone {alone:?}");
    for round in &world.rounds {
        assert!(round.duration <= alone.mul_f64(1.3), "round {}: {:?}, alone {alone:?}", round.round, round.duration);
    }
    assert!(world.rounds[0].hedged > 0 && world.rounds.iter().skip(8).all(|round| round.hedged == 0));
    assert!(world.notices.iter().any(|notice| notice.contains("is late with leaves")), "{:?}", world.notices);
    assert!(world.records.contains("\"hedged\":["));
}

/// Scenario: a slow worker becomes fast in the middle of a run. Property: it gets its share back.
#[test]
fn a_worker_that_recovers_gets_its_share_back() {
    let (world, _) = calm(&[40, 400, 40], |world| {
        world.after(Duration::from_secs(4), Happening::Fault(Fault::Fast(2, 10)));
    });
    let last = world.rounds.last().expect("rounds");
    let (_, three) = calm(&[40, 40, 40], |_| {});
    assert!(last.duration <= three.mul_f64(1.1), "{:?}, three equal ones {three:?}", last.duration);
    assert_eq!(last.workers, 3);
}

/// Scenario: a worker freezes, and is thawed after its lease is over. Property: it is put out within the lease, joins
/// again as its next incarnation by itself, and takes part.
#[test]
fn a_frozen_worker_comes_back_as_another_incarnation() {
    let (world, _) = calm(&[40, 40, 40], |world| {
        world.after(Duration::from_secs(1), Happening::Fault(Fault::Freeze(3, Duration::from_secs(4))));
    });
    let (member, reason) = &world.left[0];
    assert_eq!(member.incarnation, 1);
    assert!(reason.starts_with("silent for 2.5 s"), "{reason}");
    let next = format!("{{\"worker\":{},\"incarnation\":2}}", member.worker);
    assert!(world.records.contains(&next), "{next} contributed nothing");
}

/// Scenario: a worker gives signs of life, but computes nothing any more. Property: its leaves are hedged, and it is
/// evicted with the reason; alone, too.
#[test]
fn a_stuck_worker_is_evicted_with_the_reason() {
    for others in [&[40, 40][..], &[]] {
        let leaf_times = [&[40], others].concat();
        let (world, _) = calm(&leaf_times, |world| {
            world.after(Duration::from_millis(900), Happening::Fault(Fault::Stick(1)));
            world.after(Duration::from_secs(90), Happening::Fault(Fault::Start));
        });
        if !others.is_empty() && world.left.is_empty() {
            // The others were done before it was given up.
            assert!(world.rounds.iter().any(|round| round.hedged > 0));
            continue;
        }
        let (_, reason) = &world.left[0];
        assert!(reason.contains("delivered nothing for 60.0 s"), "{reason}");
    }
}

/// A run in which every leaf is checked, process 1 of these workers becomes wrong at some time, and another starts late.
fn with_a_wrong_one(seed: u64, workers: u32) -> World {
    let mut world = wrong_world(seed, workers);
    world.run();
    world
}

fn wrong_world(seed: u64, workers: u32) -> World {
    let mut random = Stream::new(seed, Purpose::SelfTest, 2, 0);
    let spec = spec(1 << random.below(5), |config| {
        config.cluster.start_workers = workers;
        config.cluster.spot_check = 1;
    });
    let mut world = World::new(spec, seed);
    for _ in 0..workers {
        world.start(Duration::from_millis(u64::from(10 + random.below(50))));
    }
    let wrong_from = Duration::from_millis(u64::from(random.below(1500)));
    world.after(wrong_from, Happening::Fault(Fault::Corrupt(1)));
    // With two there would be a time with nobody to compare with.
    if workers > 2 && random.below(2) == 0 {
        world.after(wrong_from, Happening::Fault(Fault::Freeze(2, Duration::from_millis(700))));
    }
    world.after(Duration::from_secs(20), Happening::Fault(Fault::Start));
    world
}

/// Scenario: one of three to five workers computes wrong bits from some time on; every leaf is checked. Property: it is
/// named and barred, nothing that it computed is in the result, and nobody honest is put out for it.
#[test]
fn a_worker_that_computes_wrong_is_found_and_barred() {
    for seed in 0..300 {
        let world = with_a_wrong_one(seed, 3 + seed as u32 % 3);
        assert_eq!(world.parameters, right_parameters(&world.spec), "seed {seed}: the hash is wrong");
        audit(world.records.as_bytes(), MAX_SAMPLES).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let mut wrong = world.left.iter().filter(|(_, reason)| reason.starts_with("computed leaf"));
        assert!(wrong.clone().count() <= 1, "seed {seed}: {:?}", world.left);
        if let Some((_, reason)) = wrong.next_back() {
            assert!(reason.contains("where two other workers got"), "{reason}");
            assert!(world.notices.iter().any(|notice| notice.contains("barred from the run")), "seed {seed}");
        }
    }
}

/// Scenario: as above, and the coordinator is killed again and again, its newest checkpoint damaged or not. Property: the
/// result is right, although whom it has barred since its checkpoint it does not know any more.
#[test]
fn a_worker_that_computes_wrong_is_found_by_a_restarted_coordinator_too() {
    for seed in 0..200 {
        let mut world = wrong_world(seed, 4);
        for kill in 0..4 {
            let at = world.millis(0, 2500) + Duration::from_millis(2000 * kill);
            let (down, damage) = (world.millis(10, 600), kill % 2 == 1);
            world.after(at, Happening::Fault(Fault::KillCoordinator { down, damage }));
        }
        world.run();
        assert_eq!(world.parameters, right_parameters(&world.spec), "seed {seed}: the hash is wrong");
        audit(world.records.as_bytes(), MAX_SAMPLES).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

/// Scenario: one of two workers computes wrong bits. Property: nobody can tell which one; the run waits, and says for
/// what; a third worker decides, and the result is right.
#[test]
fn two_that_disagree_wait_for_a_third() {
    let mut waited = 0;
    for seed in 0..100 {
        let world = with_a_wrong_one(seed, 2);
        assert_eq!(world.parameters, right_parameters(&world.spec), "seed {seed}: the hash is wrong");
        waited += u32::from(world.notices.iter().any(|notice| notice.contains("needs a third worker")));
    }
    assert!(waited > 20, "only {waited} of 100 runs had to wait");
}
