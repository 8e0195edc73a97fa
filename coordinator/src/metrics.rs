//! The run in numbers, in the text format that Prometheus reads.
//!
//! Counters begin at zero when a coordinator is started, but those that the run's checkpoint holds: rounds, samples, and
//! workers. Nothing here grows with the number of workers or rounds.

pub mod http;
mod process;
pub mod totals;

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_common::progress::{RunState, RunStatus};

use self::process::Process;
use self::totals::{BUCKETS, Totals};
use crate::monitor::Hub;

/// The media type of [`text`].
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The states of a run, by their names in the metrics.
const STATES: [&str; 4] = ["waiting", "training", "evaluating", "finished"];

/// All metrics of a run and of this process.
pub fn text(hub: &Hub) -> String {
    let mut page = Page::default();
    run(&mut page, &hub.status());
    totals(&mut page, &hub.totals());
    if let Some(process) = Process::read() {
        page.counter("process_cpu_seconds_total", "User and system CPU time.", process.cpu_seconds);
        page.gauge("process_resident_memory_bytes", "Resident memory.", process.resident_bytes as f64);
    }
    page.text
}

fn run(page: &mut Page, status: &RunStatus) {
    page.family("lockstep_run_info", "gauge", "The run, its model, and the version of the software.");
    let info = [("run", &status.run[..]), ("model", &status.model), ("version", &status.version)];
    page.sample("lockstep_run_info", &info, 1.0);
    page.family("lockstep_run_state", "gauge", "1 for what the run is doing, 0 for the other states.");
    for state in STATES {
        page.sample("lockstep_run_state", &[("state", state)], f64::from(u8::from(state == name(&status.state))));
    }
    let epochs = status.rounds / u64::from(status.rounds_per_epoch.max(1));
    page.counter("lockstep_rounds_total", "Rounds committed.", status.rounds as f64);
    page.gauge("lockstep_rounds_planned", "Rounds after which the run ends.", status.total_rounds as f64);
    page.counter("lockstep_epochs_total", "Epochs completed.", epochs as f64);
    page.counter("lockstep_samples_total", "Training samples used.", status.samples_seen as f64);
    page.gauge("lockstep_samples_per_second", "Samples a second, over the last rounds.", status.samples_per_second);
    page.gauge("lockstep_model_parameters", "Parameters of the model.", status.parameters as f64);
    page.optional("lockstep_round_loss", "Loss of the last round.", status.loss);
    page.optional("lockstep_train_loss", "Training loss of the last whole epoch.", status.train_loss);
    page.optional("lockstep_validation_loss", "Validation loss after the last whole epoch.", status.validation_loss);
    page.gauge("lockstep_workers", "Members at present.", f64::from(status.workers));
    page.gauge("lockstep_workers_required", "Members needed for a round.", f64::from(status.min_workers));
    let problems = status.problems.len() as f64;
    page.gauge("lockstep_problems", "Problems at present, such as files that cannot be written.", problems);
}

fn totals(page: &mut Page, totals: &Totals) {
    let lost = f64::from(totals.workers_lost);
    page.counter("lockstep_workers_joined_total", "Workers admitted to the run.", f64::from(totals.workers_joined));
    page.counter("lockstep_workers_lost_total", "Members lost or evicted without having drained.", lost);
    let hedged = totals.hedged_leaves as f64;
    page.counter("lockstep_hedged_leaves_total", "Late leaves that a second member was asked to compute.", hedged);
    page.counter("lockstep_checkpoints_total", "Checkpoints written.", totals.checkpoints as f64);
    page.optional(
        "lockstep_checkpoint_timestamp_seconds",
        "When the newest checkpoint of this coordinator was written, in seconds since 1970-01-01 UTC.",
        totals.newest_checkpoint.map(unix_seconds),
    );

    let times = &totals.round_times;
    page.family("lockstep_round_duration_seconds", "histogram", "From a round's start to its commit.");
    let mut below = 0;
    for (bound, count) in BUCKETS.iter().zip(times.counts) {
        below += count;
        page.sample("lockstep_round_duration_seconds_bucket", &[("le", &bound.to_string())], below as f64);
    }
    page.sample("lockstep_round_duration_seconds_bucket", &[("le", "+Inf")], times.count as f64);
    page.sample("lockstep_round_duration_seconds_sum", &[], times.sum.as_secs_f64());
    page.sample("lockstep_round_duration_seconds_count", &[], times.count as f64);

    page.family("lockstep_round_part_seconds_total", "counter", "Where the time of rounds went; the parts add up.");
    let parts = &times.parts;
    let parts = [
        ("compute", parts.compute),
        ("transfer", parts.transfer),
        ("reduce", parts.reduce),
        ("update", parts.update),
        ("wait", parts.wait),
    ];
    for (part, time) in parts {
        page.sample("lockstep_round_part_seconds_total", &[("part", part)], time.as_secs_f64());
    }
}

fn name(state: &RunState) -> &'static str {
    match state {
        RunState::Waiting { .. } => "waiting",
        RunState::Training => "training",
        RunState::Evaluating => "evaluating",
        RunState::Finished { .. } => "finished",
    }
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A page of metrics in the making.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    /// A gauge that is left out while there is no value.
    fn optional(&mut self, name: &str, help: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.gauge(name, help, value);
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{before}{label}=\"{}\"", escape(text));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let value = match value {
            value if value == f64::INFINITY => "+Inf".to_owned(),
            value if value == f64::NEG_INFINITY => "-Inf".to_owned(),
            value => value.to_string(),
        };
        let _ = writeln!(self.text, " {value}");
    }
}

/// A label's value as the format wants it.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lockstep_common::hash::Digest;
    use lockstep_common::progress::{Breakdown, Event, RoundReport};

    use super::*;

    fn round(milliseconds: u64, hedged: u32) -> Event {
        let duration = Duration::from_millis(milliseconds);
        Event::Round(RoundReport {
            round: 0,
            epoch: 0,
            batch: 0,
            loss: 0.5,
            gradient_norm: 1.0,
            samples: 64,
            parameters: Digest(1),
            workers: 2,
            hedged,
            skipped: false,
            duration,
            breakdown: Breakdown { compute: duration, ..Breakdown::default() },
        })
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_all_rounds() {
        let mut sums = Totals::default();
        for milliseconds in [1, 3, 3, 70_000] {
            sums.note(&round(milliseconds, 2));
        }
        sums.checkpoint_written(UNIX_EPOCH + Duration::from_millis(1500));
        let mut page = Page::default();
        totals(&mut page, &sums);
        let bucket = |bound: &str| format!("lockstep_round_duration_seconds_bucket{{le=\"{bound}\"}}");
        for line in [
            format!("{} 1", bucket("0.001")),
            format!("{} 1", bucket("0.0025")),
            format!("{} 3", bucket("0.005")),
            format!("{} 3", bucket("60")),
            format!("{} 4", bucket("+Inf")),
            "lockstep_round_duration_seconds_count 4".to_owned(),
            "lockstep_round_duration_seconds_sum 70.007".to_owned(),
            "lockstep_round_part_seconds_total{part=\"compute\"} 70.007".to_owned(),
            "lockstep_hedged_leaves_total 8".to_owned(),
            "lockstep_checkpoint_timestamp_seconds 1.5".to_owned(),
        ] {
            assert!(page.text.lines().any(|have| have == line), "{line} is not in\n{}", page.text);
        }
    }

    #[test]
    fn every_sample_follows_the_head_of_its_family_once() {
        let mut page = Page::default();
        totals(&mut page, &Totals::default());
        let mut families = Vec::new();
        for line in page.text.lines() {
            if let Some(head) = line.strip_prefix("# TYPE ") {
                let name = head.split(' ').next().unwrap().to_owned();
                assert!(!families.contains(&name), "{name} comes twice");
                families.push(name);
            } else if !line.starts_with('#') {
                let family = families.last().unwrap();
                assert!(line.starts_with(family.as_str()), "{line} follows {family}");
            }
        }
    }

    #[test]
    fn labels_and_values_are_written_as_the_format_wants_them() {
        let mut page = Page::default();
        page.sample("m", &[("a", "say \"x\\y\"\n"), ("b", "")], f64::INFINITY);
        page.sample("m", &[], f64::NAN);
        assert_eq!(page.text, "m{a=\"say \\\"x\\\\y\\\"\\n\",b=\"\"} +Inf\nm NaN\n");
    }
}
