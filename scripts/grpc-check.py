#!/usr/bin/env python3
"""Checks a coordinator's gRPC services from outside: another language, another gRPC library, no generated code.

    python -m pip install grpcio grpcio-reflection
    lockstep coordinator --listen 127.0.0.1:7400 &
    scripts/grpc-check.py 127.0.0.1:7400 &
    lockstep worker --coordinator http://127.0.0.1:7400

Everything about the services is learnt from the server by reflection. The script follows the run to its end, prints a
short report, and exits with 1 if anything is not as it should be, with 2 if it was called wrongly.
"""

import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

MONITOR = "lockstep.v1.MonitorService"
WORKER = "lockstep.v1.WorkerService"
HEALTH = "grpc.health.v1.Health"

# How long the coordinator may take to accept the connection, and to answer a call.
CONNECT_SECONDS = 10
ANSWER_SECONDS = 10


class CheckFailed(Exception):
    """Something is not as it should be."""


def check(condition, problem):
    if not condition:
        raise CheckFailed(problem)


class Services:
    """Calls methods by name, with messages made from what the server says about itself."""

    def __init__(self, channel):
        self.channel = channel
        self.reflection = ProtoReflectionDescriptorDatabase(channel)
        self.pool = descriptor_pool.DescriptorPool(self.reflection)

    def names(self):
        return sorted(self.reflection.get_services())

    def call(self, service, method, fields=None, timeout=ANSWER_SECONDS):
        """The response; an iterator of responses if the method streams them."""
        found = self.pool.FindServiceByName(service).FindMethodByName(method)
        check(not found.client_streaming, f"{service}.{method} takes a stream")
        request = message_factory.GetMessageClass(found.input_type)(**(fields or {}))
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        call = kind(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
        )
        return call(request, timeout=timeout)


def check_services(services):
    names = services.names()
    for name in [MONITOR, WORKER, HEALTH]:
        check(name in names, f"{name} is not among the services {names}")
    print(f"services   {', '.join(names)}")
    methods = services.pool.FindServiceByName(WORKER).methods
    streams = {method.name: (method.client_streaming, method.server_streaming) for method in methods}
    expected = {"Session": (True, True), "Exchange": (True, True), "FetchShard": (False, True)}
    check(streams == expected, f"{WORKER} has {streams}, not {expected}")


def check_health(services):
    # The empty name stands for the server as a whole.
    for name in ["", MONITOR, WORKER]:
        response = services.call(HEALTH, "Check", {"service": name})
        status = response.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[response.status].name
        check(status == "SERVING", f"the health of {name or 'the server'} is {status}")
    print("health     SERVING")
    try:
        services.call(HEALTH, "Check", {"service": "no.such.Service"})
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.NOT_FOUND, f"an unknown service's health: {error.code()}")
    else:
        raise CheckFailed("an unknown service has a health")


def check_run(services):
    run = services.call(MONITOR, "GetRun").run
    check(run.run and run.model and run.version, f"GetRun leaves names empty: {run}")
    check(run.total_rounds > 0 and run.rounds_per_epoch > 0, f"GetRun knows no rounds: {run}")
    check(run.parameters > 0 and run.batch_size >= run.shards > 0, f"GetRun's numbers cannot be: {run}")
    check(run.rounds <= run.total_rounds, f"{run.rounds} of {run.total_rounds} rounds are done")
    state = run.state.WhichOneof("state")
    check(state in ("waiting", "training", "evaluating", "ended"), f"the run's state is {state}")
    print(
        f"run        {run.run}: model {run.model}, {run.parameters} parameters, lockstep {run.version}, "
        f"{state}, {run.rounds} of {run.total_rounds} rounds done"
    )
    return run


def check_workers(services):
    workers = services.call(MONITOR, "ListWorkers").workers
    ids = [(worker.member.worker, worker.member.incarnation) for worker in workers]
    check(ids == sorted(set(ids)), f"the members are not listed once and ascending: {ids}")
    for worker in workers:
        check(worker.name and worker.isa and worker.threads > 0, f"ListWorkers leaves fields empty: {worker}")
    listed = [f"w{worker.member.worker} {worker.name} ({worker.isa}, {worker.threads} threads)" for worker in workers]
    print(f"workers    {', '.join(listed) or 'none yet'}")


def follow(services, run):
    """Follows the run from its first round to its end. Rounds must come in order and without gaps."""
    next_round, samples, members, last_ms, ended = 0, 0, {}, 0, None
    for response in services.call(MONITOR, "Watch", {"from_round": 0}, timeout=None):
        event = response.event
        kind = event.WhichOneof("event")
        check(ended is None, f"{kind} came after the end of the run")
        check(event.unix_ms >= last_ms, f"time went back from {last_ms} to {event.unix_ms} ms")
        last_ms = event.unix_ms
        if kind == "round":
            report = event.round
            check(report.round == next_round, f"round {report.round} came where round {next_round} was due")
            place = (report.epoch, report.batch)
            expected = divmod(report.round, run.rounds_per_epoch)
            check(place == expected, f"round {report.round} is at {place}, not at (epoch, batch) {expected}")
            check(len(report.parameters) == 16, f"round {report.round}: a digest of {len(report.parameters)} bytes")
            check(report.loss == report.loss and report.samples > 0, f"round {report.round} makes no sense: {report}")
            check(report.workers > 0, f"round {report.round} was made by nobody")
            next_round, samples = next_round + 1, samples + report.samples
        elif kind == "epoch":
            check(event.epoch.rounds == next_round, f"an epoch ends after {event.epoch.rounds}, not {next_round} rounds")
        elif kind == "joined":
            member = (event.joined.member.worker, event.joined.member.incarnation)
            check(member not in members, f"member {member} joined twice")
            members[member] = event.joined.name
        elif kind == "left":
            member = (event.left.member.worker, event.left.member.incarnation)
            check(member in members, f"member {member} left without having joined")
        elif kind == "state":
            if event.state.WhichOneof("state") == "ended":
                ended = event.state.ended.reason
        else:
            check(kind == "notice", f"an event of unknown kind {kind}")
    check(ended is not None, f"the stream ended after {next_round} rounds, but the run has not")
    check(next_round == run.total_rounds, f"{next_round} of {run.total_rounds} rounds were seen; the run says: {ended}")
    print(f"rounds     0 to {next_round - 1}, each once and in order: {samples} samples, {len(members)} workers")
    print(f"end        {ended}")


def main(arguments):
    if len(arguments) != 1 or ":" not in arguments[0]:
        print(f"usage: {sys.argv[0]} HOST:PORT", file=sys.stderr)
        return 2
    try:
        with grpc.insecure_channel(arguments[0]) as channel:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
            services = Services(channel)
            check_services(services)
            check_health(services)
            run = check_run(services)
            check_workers(services)
            follow(services, run)
    except CheckFailed as problem:
        print(f"FAILED     {problem}", file=sys.stderr)
    except grpc.FutureTimeoutError:
        print(f"FAILED     nobody answers at {arguments[0]} within {CONNECT_SECONDS} s", file=sys.stderr)
    except grpc.RpcError as error:
        print(f"FAILED     {error.code()}: {error.details()}", file=sys.stderr)
    else:
        print("ok")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
