"""What the faults of some storms cost: seconds, from the events that the coordinators printed."""

import json
import statistics


class Story:
    """One storm: its faults, the events in order, and when there was a coordinator, and then none (Unix milliseconds)."""

    def __init__(self, faults, events_file, there, gone):
        self.faults, self.there, self.gone = faults, there, gone
        self.events = list(events_of(events_file))
        self.rounds = [event for event in self.events if event["event"] == "round"]
        # No member's number is given twice, whatever was killed.
        names = {member(event): event["name"] for event in self.events if event["event"] == "joined"}
        for event in self.events:
            if event["event"] == "left":
                event["name"] = names.get(member(event))

    def first(self, kind, since, before=float("inf"), **wanted):
        """The first event of a kind in this time, with these fields."""
        for event in self.events:
            if event["event"] == kind and since <= event["unix_ms"] < before:
                if all(event[field] == value for field, value in wanted.items()):
                    return event
        return None

    def life(self, at):
        """From when to when the coordinator of this time completed rounds."""
        first = self.first("round", max(there for there in self.there if there <= at))
        end = next((gone for gone in self.gone if gone >= at), float("inf"))
        return first["unix_ms"] if first else float("inf"), end

    def is_without_coordinator(self, at):
        """Or with one that has just come back."""
        return self.life(at)[0] > at or any(gone <= at and back > at for gone, back in zip(self.gone, self.there[1:]))


def member(event):
    return event["member"]["worker"], event["member"]["incarnation"]


def events_of(path):
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            # The last line of a coordinator that was killed.
            continue
        # A summary is a line, too.
        if isinstance(event, dict) and "event" in event:
            yield event


class Report:
    def __init__(self):
        self.usual, self.rounds, self.hedged = [], 0, 0
        # For each kind of fault: how often it came, and the seconds of each column.
        self.on_workers, self.on_coordinators = {}, {}

    def add(self, story):
        usual = statistics.median(event["seconds"] for event in story.rounds)
        self.usual.append(usual)
        self.rounds += len(story.rounds)
        self.hedged += sum(event.get("hedged", 0) for event in story.rounds)
        for kind, name, at in story.faults:
            if name is None:
                self.coordinator(story, kind, at)
            else:
                self.worker(story, usual, kind, name, at)

    def worker(self, story, usual, kind, name, at):
        times, extra, out, back = self.on_workers.setdefault(kind, ([], [], [], []))
        times.append(at)
        # Nothing can be said about workers then.
        if story.is_without_coordinator(at):
            return
        end = story.life(at)[1]
        # Its report comes after the fault, and it began before the fault, or right after it.
        if after := story.first("round", at, end):
            extra.append(max(0.0, after["seconds"] - usual))
        left = None
        if kind != "joined" and (left := story.first("left", at, end, name=name)):
            out.append((left["unix_ms"] - at) / 1000)
        if left or kind == "joined":
            if joined := story.first("joined", left["unix_ms"] if left else at, end, name=name):
                back.append((joined["unix_ms"] - at) / 1000)

    def coordinator(self, story, kind, at):
        times, next_round, caught_up, lost = self.on_coordinators.setdefault(kind, ([], [], [], []))
        times.append(at)
        known = max((event["round"] for event in story.rounds if event["unix_ms"] < at), default=-1)
        back = next((there for there in story.there if there >= at), None)
        after = back and story.first("round", back)
        if not after:
            return
        next_round.append((after["unix_ms"] - back) / 1000)
        lost.append(max(0, known + 1 - after["round"]))
        # Unless it is struck again before.
        end = next((gone for gone in story.gone if gone > back), float("inf"))
        again = (event for event in story.rounds if back <= event["unix_ms"] < end and event["round"] > known)
        if first := next(again, None):
            caught_up.append((first["unix_ms"] - back) / 1000)

    def print(self):
        usual = statistics.median(self.usual)
        print(f"\nmedian round {usual * 1000:.1f} ms, {self.rounds} rounds, {self.hedged} hedged leaves; seconds, median and p99:")
        table("fault on a worker", ["extra round", "put out", "member again"], self.on_workers)
        table("fault on the coordinator", ["next round", "caught up", "rounds again"], self.on_coordinators)


def table(title, columns, rows):
    print(f"\n| {title} | times | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for kind, (times, *values) in sorted(rows.items()):
        print(f"| {kind} | {len(times)} | {' | '.join(map(shown, values))} |")


def shown(values):
    if not values:
        return ""
    values = sorted(values)
    p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
    return f"{statistics.median(values):.2f}, {p99:.2f}"
