"""The processes of a run: a coordinator that is started again when it was killed, and workers that come and go."""

import re
import signal
import subprocess
import time

MOST_WORKERS = 6
# A worker that nothing was done to for so long must notice by itself that the run has ended.
SETTLED_SECONDS = 10


class Worker:
    def __init__(self, name, process, namespace, log):
        self.name, self.process, self.namespace, self.log = name, process, namespace, log
        self.touched = time.monotonic()

    def signal(self, number):
        # It may have ended by itself, with the run.
        if self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self):
        return self.log.read_text()[-600:]


class Cluster:
    def __init__(self, lockstep, directory, settings, network):
        self.lockstep, self.directory, self.network = lockstep, directory, network
        self.settings = settings
        self.workers = {}
        self.leaving = []
        self.started = 0
        self.port = 0
        # When there was a coordinator that could do something, from when on there was none, again and again.
        self.there, self.gone = [], []
        self.coordinator = None

    def start_coordinator(self):
        """The same command begins the run and goes on with it, at the same port."""
        address = f"0.0.0.0:{self.port}" if self.network else f"127.0.0.1:{self.port}"
        command = [self.lockstep, "coordinator", "--listen", address, *self.settings, "--auto-resume", "--json"]
        command += ["--insecure"] if self.network else []
        with open(self.directory / "events", "a") as events, open(self.directory / "coordinator.log", "a") as log:
            self.coordinator = subprocess.Popen(command, stdout=events, stderr=log)
        self.there.append(time.time() * 1000)
        self.found = self.checkpoints()
        while self.port == 0:
            said = (self.directory / "coordinator.log").read_text()
            if found := re.search(r"--coordinator http://[0-9.]+:(\d+)", said):
                self.port = int(found[1])
            elif self.coordinator.poll() is not None:
                raise SystemExit(f"the coordinator does not start:\n{said}")
            time.sleep(0.02)

    def checkpoints(self):
        return set((self.directory / "run" / "checkpoints").glob("*.checkpoint"))

    def has_new_checkpoint(self):
        """Whether this coordinator has got further than the one before it."""
        return bool(self.checkpoints() - self.found)

    def kill_coordinator(self):
        """Whether a checkpoint was being written."""
        self.gone.append(time.time() * 1000)
        self.coordinator.kill()
        self.coordinator.wait()
        return self.is_writing_checkpoint()

    def freeze_coordinator(self):
        """Gives what thaws it."""
        self.gone.append(time.time() * 1000)
        self.coordinator.send_signal(signal.SIGSTOP)
        return self.thaw_coordinator

    def thaw_coordinator(self):
        self.coordinator.send_signal(signal.SIGCONT)
        self.there.append(time.time() * 1000)

    def is_writing_checkpoint(self):
        return any((self.directory / "run" / "checkpoints").glob("*.partial"))

    def start_worker(self):
        self.started += 1
        name, host, wrap, namespace = f"chaos-{self.started}", "127.0.0.1", [], None
        if self.network:
            namespace, host = self.network.add()
            wrap = ["ip", "netns", "exec", namespace]
        log = self.directory / f"{name}.log"
        command = [*wrap, self.lockstep, "worker", "--coordinator", f"http://{host}:{self.port}", "--name", name,
                   "--threads", "1", "--patience", "60"]
        # Both ways for tensors: every other worker sends them through its connection.
        command += ["--no-shared-memory"] if self.started % 2 == 0 else []
        with open(log, "w") as out:
            self.workers[name] = Worker(name, subprocess.Popen(command, stdout=out, stderr=out), namespace, log)
        return self.workers[name]

    def kill_worker(self, worker):
        del self.workers[worker.name]
        worker.process.kill()
        worker.process.wait()

    def drain_worker(self, worker):
        del self.workers[worker.name]
        worker.signal(signal.SIGTERM)
        self.leaving.append(worker)

    def problems(self):
        """What should not be, while the run goes on."""
        ended = [worker for worker in self.workers.values() if worker.process.poll() not in (None, 0)]
        return [f"{worker.name} ended with {worker.process.returncode}:\n{worker.last_words()}" for worker in ended]

    def farewell(self):
        """The run has ended, and so must the workers. Gives what is wrong."""
        problems = []
        settled = [w for w in self.workers.values() if time.monotonic() - w.touched > SETTLED_SECONDS]
        for worker in settled + self.leaving:
            try:
                code = worker.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                code = "nothing within 30 s"
            if code != 0:
                drained = "was drained and " if worker in self.leaving else ""
                problems.append(f"{worker.name} {drained}ended with {code}:\n{worker.last_words()}")
        return problems

    def end(self):
        for worker in [*self.workers.values(), *self.leaving]:
            worker.process.kill()
            worker.process.wait()
        if self.coordinator and self.coordinator.poll() is None:
            self.coordinator.kill()
            self.coordinator.wait()
