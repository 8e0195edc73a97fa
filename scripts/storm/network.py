"""A network for each worker, and what can be done to it. Needs root, ip, tc and iptables."""

import os
import subprocess


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


class Network:
    """A namespace for each worker, and one veth pair each to the coordinator's side."""

    def __init__(self):
        self.tag = f"ls{os.getpid() % 10000}"
        self.count = 0

    def add(self):
        """A new namespace: its name, and the coordinator's address as seen from there."""
        self.count += 1
        name, outer, inner = (f"{self.tag}{kind}{self.count}" for kind in "noi")
        net = f"10.{100 + os.getpid() % 100}.{self.count}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        run("ip", "addr", "add", f"{net}.1/24", "dev", outer)
        run("ip", "link", "set", outer, "up")
        run("ip", "-n", name, "addr", "add", f"{net}.2/24", "dev", inner)
        run("ip", "-n", name, "link", "set", inner, "up")
        return name, f"{net}.1"

    def can_delay(self):
        """Whether the kernel has netem."""
        name, _ = self.add()
        link = f"{self.tag}i{self.count}"
        tried = subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", link, "root", "netem", "delay", "1ms"],
                               capture_output=True)
        return tried.returncode == 0

    def disturb(self, name, kind, part):
        """Does something to a worker's network; `part`, from 0 to 1, says how bad. Gives what undoes it."""
        link = f"{self.tag}i{name.removeprefix(f'{self.tag}n')}"
        match kind:
            case "cut off":
                return self.drop(name, ("INPUT", "OUTPUT"))
            case "cut one way":
                return self.drop(name, ("INPUT",) if part < 0.5 else ("OUTPUT",))
            case "lossy":
                lost = f"{0.02 + 0.18 * part:.3f}"
                return self.drop(name, ("INPUT", "OUTPUT"), "-m", "statistic", "--mode", "random", "--probability", lost)
            case "slow link":
                return self.shape(name, link, "tbf", "rate", f"{int(10 + 90 * part)}mbit", "burst", "64kb",
                                  "latency", "400ms")
            case "delayed":
                return self.shape(name, link, "netem", "delay", f"{int(10 + 190 * part)}ms", "20ms")

    def drop(self, name, chains, *match):
        for chain in chains:
            run("ip", "netns", "exec", name, "iptables", "-A", chain, *match, "-j", "DROP")
        return lambda: [run("ip", "netns", "exec", name, "iptables", "-F", chain) for chain in chains]

    def shape(self, name, link, *discipline):
        run("tc", "-n", name, "qdisc", "add", "dev", link, "root", *discipline)
        return lambda: run("tc", "-n", name, "qdisc", "del", "dev", link, "root")

    def remove(self):
        for number in range(1, self.count + 1):
            subprocess.run(["ip", "netns", "del", f"{self.tag}n{number}"], capture_output=True)
