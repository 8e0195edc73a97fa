//! The coordinator's disk, its death and its return.

use std::time::Duration;

use lockstep_common::checkpoint::Standing;
use lockstep_common::hash::Digest;
use lockstep_common::ledger::{Chain, Header};
use lockstep_coordinator::round::{CheckpointId, Event, Machine, Occasion};

use crate::world::{Happening, Tensors, World};

/// How many checkpoints are kept.
const KEEP: usize = 3;

/// A checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    id: CheckpointId,
    standing: Standing,
    tensors: Tensors,
    /// Length of the ledger.
    ledger: usize,
    chain: Chain,
}

/// What outlives the coordinator.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    /// The newest last.
    checkpoints: Vec<Snapshot>,
    /// One is being written until then, and another one may wait behind it.
    busy_until: Duration,
}

impl World {
    /// Takes a snapshot; the writer gets it to the disk, some time.
    pub(crate) fn checkpoint(&mut self, id: CheckpointId, standing: Standing, occasion: Occasion) {
        assert_eq!(standing.rounds, self.rounds.len() as u64, "seed {}: checkpoints are taken at edges", self.seed);
        if occasion == Occasion::Due && self.disk.busy_until > self.now {
            return self.after(Duration::ZERO, Happening::Arrives(Event::NotSaved(id)));
        }
        let snapshot =
            Snapshot { id, standing, tensors: self.parameters, ledger: self.records.len(), chain: self.chain.clone() };
        let takes = match self.random.below(100) {
            // Nobody waits for such a disk to the end.
            0 if self.stalls => Duration::from_secs(70),
            1..10 if self.stalls => self.millis(50, 900),
            _ => self.millis(1, 30),
        };
        let whole = !self.stalls || self.random.below(20) > 0;
        self.disk.busy_until = self.disk.busy_until.max(self.now) + takes;
        let delay = self.disk.busy_until - self.now;
        self.after(delay, Happening::Written(Box::new(snapshot), whole));
    }

    pub(crate) fn written(&mut self, snapshot: Snapshot, whole: bool) {
        let id = snapshot.id;
        if !whole {
            return self.event(Event::NotSaved(id));
        }
        self.disk.checkpoints.push(snapshot);
        let older = self.disk.checkpoints.len().saturating_sub(KEEP);
        self.disk.checkpoints.drain(..older);
        self.event(Event::Saved(id));
    }

    /// The coordinator is gone with everything that was on its way to it. With `damage`, its newest checkpoint is torn.
    pub(crate) fn kill_coordinator(&mut self, down: Duration, damage: bool) {
        if self.machine.take().is_none() {
            return;
        }
        self.queue.retain(|_, what| !what.is_of_coordinator());
        self.connected.clear();
        (self.sums, self.made) = (None, None);
        self.disk.busy_until = Duration::ZERO;
        if damage {
            self.disk.checkpoints.pop();
        }
        self.after(down, Happening::Up);
    }

    /// Goes on from the newest whole checkpoint, or from the beginning.
    pub(crate) fn up(&mut self) {
        self.restarts += 1;
        self.born = self.now;
        let layout = self.spec.model.layout.hash();
        let header = Header::new("sim", &self.spec.schedule, layout, Digest(1));
        let Snapshot { standing, tensors, ledger, chain, .. } =
            self.disk.checkpoints.last().cloned().unwrap_or_else(|| {
                let (chain, header) = Chain::start(&header);
                let (id, standing, tensors) = (CheckpointId(0), Standing::default(), Tensors::INITIAL);
                Snapshot { id, standing, tensors, ledger: header.len(), chain }
            });
        self.records.truncate(ledger);
        self.rounds.truncate(standing.rounds as usize);
        (self.parameters, self.chain) = (tensors, chain);
        let over = standing.rounds == self.spec.total_rounds() && standing.evaluated == standing.rounds;
        self.machine = Some(Machine::resume(self.config(), &standing, self.restarts));
        // Everybody was dismissed, or may have been, and the last checkpoint never got to the disk or was damaged.
        if !over && (self.dismissed || self.workers.is_empty()) {
            for _ in 0..self.spec.min_workers {
                self.start(Duration::from_millis(5));
            }
        }
    }
}
