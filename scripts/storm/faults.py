"""The storm: faults drawn by a seed, on a cluster that trains."""

import random
import signal
import time

from storm.cluster import MOST_WORKERS

# A run that does not end by then hangs.
DEADLINE_SECONDS = 900
# How often the storm looks around, and how long a worker that is slowed down runs or stands at a stretch.
TICK_SECONDS = 0.02
# A worker that is slowed down runs in one of so many ticks.
SLOWED_TIMES = 10
# How long the storm waits for a checkpoint to be written.
CHECKPOINT_SECONDS = 3

# How often each fault is in the deck that the storm draws from; when it is used up, it is shuffled again.
WORKER_FAULTS = {"killed": 3, "frozen": 3, "drained": 2, "joined": 1, "slowed": 1}
NETWORK_FAULTS = {"cut off": 3, "cut one way": 2, "lossy": 2, "slow link": 1}
COORDINATOR_FAULTS = {"coordinator killed": 1, "coordinator killed while it wrote a checkpoint": 1,
                      "coordinator frozen": 1}
KILL_MIDWAY = "coordinator killed while it wrote a checkpoint"


class Storm:
    def __init__(self, cluster, seed, workers, pause, delays):
        self.cluster, self.workers, self.pause = cluster, workers, pause
        self.random = random.Random(seed)
        self.kinds = WORKER_FAULTS | COORDINATOR_FAULTS
        if cluster.network:
            self.kinds |= NETWORK_FAULTS | ({"delayed": 2} if delays else {})
        self.deck = []
        # Faults that last: until when, on whom, and what undoes them.
        self.lasting = []
        self.slowed = set()
        # What was done, to whom, when.
        self.faults = []

    def run(self):
        """Until the run has ended. Gives what is wrong."""
        cluster = self.cluster
        cluster.start_coordinator()
        for _ in range(self.workers):
            cluster.start_worker()
        deadline = time.monotonic() + DEADLINE_SECONDS
        next_fault = time.monotonic() + 1
        ticks = 0
        while cluster.coordinator.poll() is None:
            if time.monotonic() > deadline:
                return [f"it hangs: no end after {DEADLINE_SECONDS} s"]
            if problems := cluster.problems():
                return problems
            self.undo()
            if time.monotonic() >= next_fault:
                self.strike()
                next_fault = time.monotonic() + self.random.uniform(0.5, 1.5) * self.pause
            ticks += 1
            for worker in self.slowed:
                worker.signal(signal.SIGCONT if ticks % SLOWED_TIMES == 0 else signal.SIGSTOP)
            time.sleep(TICK_SECONDS)
        self.undo(everything=True)
        if cluster.coordinator.returncode != 0:
            said = (cluster.directory / "coordinator.log").read_text()[-3000:]
            return [f"the coordinator ended with {cluster.coordinator.returncode}:\n{said}"]
        return cluster.farewell()

    def strike(self):
        """The next fault of the deck, if there is somebody for it."""
        if not self.deck:
            self.deck = [kind for kind, times in self.kinds.items() for _ in range(times)]
            self.random.shuffle(self.deck)
        kind = self.deck.pop()
        seconds, choice, part = self.random.uniform(0.3, 5), self.random.random(), self.random.random()
        busy = {whom for _, whom, _ in self.lasting}
        if kind in COORDINATOR_FAULTS:
            # A run gets further only if its coordinator lives until the next checkpoint.
            if self.cluster in busy or not self.cluster.has_new_checkpoint():
                return self.deck.insert(0, kind)
            return self.strike_coordinator(kind, seconds)
        well = [worker for worker in self.cluster.workers.values() if worker not in busy]
        if kind == "joined" or len(well) < 2:
            if len(self.cluster.workers) < MOST_WORKERS:
                self.note("joined", self.cluster.start_worker().name)
            # One worker is always left alone: the run is to be disturbed, not stopped.
            return None if kind == "joined" else self.deck.insert(0, kind)
        self.strike_worker(kind, well[int(choice * len(well))], seconds, part)

    def strike_worker(self, kind, worker, seconds, part):
        self.note(kind, worker.name)
        worker.touched = time.monotonic()
        if kind == "killed":
            self.cluster.kill_worker(worker)
            self.cluster.start_worker()
        elif kind == "drained":
            self.cluster.drain_worker(worker)
            self.cluster.start_worker()
        elif kind == "frozen":
            worker.signal(signal.SIGSTOP)
            self.until(seconds, worker, lambda: worker.signal(signal.SIGCONT))
        elif kind == "slowed":
            self.slowed.add(worker)
            self.until(seconds, worker, lambda: (self.slowed.discard(worker), worker.signal(signal.SIGCONT)))
        else:
            self.until(seconds, worker, self.cluster.network.disturb(worker.namespace, kind, part))

    def strike_coordinator(self, kind, seconds):
        cluster = self.cluster
        if kind == "coordinator frozen":
            self.note(kind, None)
            return self.until(seconds, cluster, cluster.freeze_coordinator())
        if kind == KILL_MIDWAY:
            deadline = time.monotonic() + CHECKPOINT_SECONDS
            while not cluster.is_writing_checkpoint() and time.monotonic() < deadline:
                time.sleep(0.0005)
        if cluster.coordinator.poll() is not None:
            return
        self.note("coordinator killed", None)
        if cluster.kill_coordinator():
            self.faults[-1] = (KILL_MIDWAY, *self.faults[-1][1:])
        cluster.start_coordinator()

    def note(self, kind, name):
        self.faults.append((kind, name, time.time() * 1000))

    def until(self, seconds, whom, undo):
        self.lasting.append((time.monotonic() + seconds, whom, undo))

    def undo(self, everything=False):
        for lasting in list(self.lasting):
            until, whom, undo = lasting
            if everything or time.monotonic() >= until:
                undo()
                whom.touched = time.monotonic()
                self.lasting.remove(lasting)

    def missing(self):
        """Faults that never came."""
        return sorted(self.kinds.keys() - {kind for kind, _, _ in self.faults})
