//! Which samples every leaf must be computed from, to compare with what workers report.

use lockstep_common::hash::Digest;
use lockstep_common::protocol::{NodeReport, Work};
use lockstep_common::reduce::NodeId;
use lockstep_common::shard::{Schedule, even_part, samples_digest};

/// The schedule, with the orders of the epoch at hand.
#[derive(Debug)]
pub struct ExpectedSamples {
    schedule: Schedule,
    validation_samples: u32,
    assignment: Vec<Vec<u32>>,
    /// The orders of all shards in an epoch.
    orders: Option<(u32, Vec<Vec<u32>>)>,
}

impl ExpectedSamples {
    /// For a run's schedule.
    pub fn new(schedule: Schedule, validation_samples: u32) -> Self {
        Self { assignment: schedule.assignment(), schedule, validation_samples, orders: None }
    }

    /// The indices of the samples of a leaf, in the order of use.
    pub fn samples(&mut self, work: Work, leaf: u32) -> Vec<u32> {
        let shards = self.schedule.tree.shards();
        let round = match work {
            Work::Gradient { round } | Work::Inspection { round } => round,
            Work::Evaluation { .. } => return even_part(self.validation_samples, shards, leaf).collect(),
        };
        let step = self.schedule.step(round);
        if self.orders.as_ref().is_none_or(|(epoch, _)| *epoch != step.epoch) {
            let orders = (0..shards).map(|shard| self.schedule.epoch_order(step.epoch, shard)).collect();
            self.orders = Some((step.epoch, orders));
        }
        let order = self.orders.as_ref().map_or(&[][..], |(_, orders)| &orders[leaf as usize]);
        let places = self.schedule.leaf_places(step.batch, leaf);
        let assignment = &self.assignment[leaf as usize];
        order[places.start as usize..places.end as usize].iter().map(|&place| assignment[place as usize]).collect()
    }

    /// Checks a worker's report of a node.
    ///
    /// # Errors
    /// What the worker did wrong.
    pub fn check(&mut self, report: &NodeReport) -> Result<(), String> {
        let NodeReport { work, node, .. } = *report;
        if !self.schedule.tree.contains(node) {
            return Err(format!(
                "{work}: node {node} does not exist in a tree of {} shards",
                self.schedule.tree.shards()
            ));
        }
        if report.digests.len() != node.leaves().len() {
            return Err(format!(
                "{work}: node {node} has {} leaves, {} digests were reported",
                node.leaves().len(),
                report.digests.len()
            ));
        }
        let (digests, samples) = self.of_node(work, node);
        if let Some(at) = digests.iter().zip(&report.digests).position(|(expected, got)| expected != got) {
            let leaf = node.leaves().start + at as u32;
            return Err(format!("{work}: leaf {leaf} was computed from other samples than scheduled"));
        }
        if report.samples != samples {
            return Err(format!("{work}: node {node} has {samples} samples, {} were reported", report.samples));
        }
        Ok(())
    }

    fn of_node(&mut self, work: Work, node: NodeId) -> (Vec<Digest>, u32) {
        let mut count = 0;
        let digests = node.leaves().map(|leaf| {
            let samples = self.samples(work, leaf);
            count += samples.len() as u32;
            samples_digest(samples)
        });
        (digests.collect(), count)
    }
}
