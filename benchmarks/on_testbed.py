"""Predicted, emulated and real: split training between network namespaces, where nothing sleeps.

    sudo python benchmarks/on_testbed.py --testbed PATH/testbed.py --cpu 0.25 --up 10 --down 25

A testbed is a Python file with a class ``Testbed(name, devices, edges, up_mbps, down_mbps, cpu,
edge_cpu, period_ms)``: a context manager with ``ip(node)``, ``popen(node, argv, …)`` and
``set_cpu(node, cores)`` for the nodes ``edge0``, ``device0``, ``device1`` …, whose links the kernel
shapes and whose processes share a quota of processor time.

1. ``fedsys profile`` measures this machine, and over the shaped link from ``device0`` to ``edge0``
   what messages cost: on a link that delivers packet by packet a byte takes ten times as much
   processor time as on loopback. A device is the same machine, slower: by how much is measured in
   a round of the whole model within its quota, of which a processor whose caches are another's for
   most of the time makes less than its share. What the model predicts is printed before anything
   else runs.
2. ``fedsys edge`` runs in one namespace, a device with its own server app in each of the others,
   over mutual TLS. Quotas are set when all are ready to train.
3. The same setting is emulated: shaped links on loopback, devices and edge slowed by waiting.

With ``--policy fedadapt auto --change-at 4 --change-to 5`` policies decide instead, for a few
rounds, in which the rate of ``device0`` changes (and with ``--back-at`` changes back). What each
device did, what its iterations took (of the clock and of a processor), and what they would have
taken with the best cut are compared with what the model of time says of that rate. ``--agent``
names the file of FedAdapt's agent; without it one that is not trained decides.

With ``--cells`` the plans of ``auto`` are compared with PiPar's reference implementation
(`testbed_cells`).

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from fedsys import config as configuration
from fedsys.commands.bench.rounds import Watching, edge_process, watched_round
from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import MachineCosts, Messaging
from fedsys.planning.hardware import machine_costs
from fedsys.planning.planner import evaluate, plan
from fedsys.planning.workload import Device, Workload, workload
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import play_local
from fedsys.training import federation
from fedsys.training.federation import layers_of
from fedsys.transport.messages import ASSIGNMENT, OBSERVATION, settings_of
from fedsys.transport.network import Network
from fedsys.transport.security import Authority

FEDSYS = (sys.executable, "-m", "fedsys.main")

PAYLOAD = 0.956
"""Share of an Ethernet frame of 1514 bytes that is payload of TCP."""


def main() -> None:
    """Do what the arguments ask for."""
    own = {"_device": device, "_profile": profile}
    if sys.argv[1:2] and sys.argv[1] in own:
        return own[sys.argv[1]](sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the namespaces would stay
    given = _arguments()
    if given.cells is None:
        return one(given)
    import testbed_cells  # it needs this module

    print(json.dumps(testbed_cells.cells(given)))


def one(given: argparse.Namespace) -> None:
    """Profile, and compare one assignment, or policies that decide."""
    config = _config(given)
    fed = federation.federation(config)
    layers = layers_of(config, fed.dataset)
    found = profiled(given)
    host = machine_costs("host", found, layers)
    factor = slowness(given, _load(given, config, layers, host, 1.0))
    print(f"a device takes {factor:.2f} times as long", file=sys.stderr, flush=True)
    load = _load(given, config, layers, host, factor)
    if given.policy:
        rounds = {kind: decided(given, kind, load, found, factor) for kind in given.policy}
        shown = {k: v for k, v in vars(given).items() if k not in ("testbed", "agent")}
        more = {"slowness": factor, "load": os.getloadavg()[0]}
        print(json.dumps({**shown, "rounds": rounds, **more}))
        return
    choice = Assignment(given.cut, 0, given.codec, given.codec, given.micro_batches)
    predicted = max(evaluate(load, [choice] * given.devices).iteration_s)
    print(f"predicted {predicted:.3f} s", file=sys.stderr, flush=True)
    real = on_testbed(given, config)
    print(f"measured {real:.3f} s", file=sys.stderr, flush=True)
    emulated = emulate(given, config, load, found, factor)
    result = {
        **{k: v for k, v in vars(given).items() if k != "testbed"},
        "predicted_s": predicted,
        "testbed_s": real,
        "emulated_s": emulated,
        "prediction_error": predicted / real - 1,
        "emulation_error": emulated / real - 1,
        "slowness": factor,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result))


def _load(
    given: argparse.Namespace,
    config: Config,
    layers: LayeredModel,
    host: MachineCosts,
    factor: float,
) -> Workload:
    """Return what the devices do, so many times as slow, over the links of the arguments."""
    slow = slowed(host, factor)
    network = Network(given.up * 1e6 * PAYLOAD, given.down * 1e6 * PAYLOAD)
    return workload(
        layers,
        [Device(f"device{i}", slow, network, 1) for i in range(given.devices)],
        [host],
        config.client.batch_size,
        micro_batches=[given.micro_batches],
        codecs=[given.codec],
        exchange=False,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True, help="file with the class Testbed")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--cpu", type=float, default=0.25, help="cores of each device")
    parser.add_argument("--up", type=float, default=10.0, help="Mbit/s of Ethernet frames")
    parser.add_argument("--down", type=float, default=25.0)
    parser.add_argument("--cut", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=10)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--policy", nargs="+", default=[], help="policies that decide on cuts")
    parser.add_argument(
        "--agent", type=Path, help="file of an agent, for fedadapt; else one untrained"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--change-at", type=int, default=4, help="round with another rate")
    parser.add_argument("--change-to", type=float, default=5.0, help="Mbit/s of device0 from then")
    parser.add_argument("--back-at", type=int, default=0, help="round with the first one; 0: none")
    parser.add_argument(
        "--cells", nargs="*", help="against PiPar; e.g. 10:wifi 25:4g, without any: all cells"
    )
    parser.add_argument("--images", type=Path, help="cells: folder of real images, by class")
    parser.add_argument("--base", type=Path, help="cells: checkout of bde1fc2")
    parser.add_argument("--beside", action="store_true", help="cells: and cut 1 of both checkouts")
    parser.add_argument("--keep", type=Path, help="cells: file of what was measured, to go on")
    parser.add_argument("--kernels", default="fused", choices=["plain", "fused"])
    parser.add_argument(
        "--memory-format", default="channels_last", choices=["contiguous", "channels_last"]
    )
    parser.add_argument("--link", default="tcp", choices=["tcp", "grpc"])
    parser.add_argument("--repeats", type=int, default=5, help="cells: of the profile")
    return parser.parse_args()


def _config(given: argparse.Namespace, kind: str = "fixed") -> Config:
    text = configuration.compose_text(f"+bench=pipeline run.plots=false policy={kind}")
    base = configuration.parse(text)
    values: dict[str, Any] = {
        "num_clients": 1,
        "data": {"examples": _examples(given, base.client.batch_size)},
        "policy": _policy(given, kind),
        "fleet": {"machines": {}, "devices": [], "servers": []},
    }
    return configuration.parse(configuration.with_values(text, **values))


def _examples(given: argparse.Namespace, batch: int) -> int:
    """Return how many examples hold the mini-batches of a round, beside those for validation."""
    return round(batch * (given.iterations + 3) / 0.9)


def slowed(costs: MachineCosts, factor: float) -> MachineCosts:
    """Return a machine that takes `factor` times as long for everything, messages included."""
    messaging = Messaging(
        costs.messaging.message_s * factor,
        {codec: value * factor for codec, value in costs.messaging.byte_s.items()},
    )
    return dataclasses.replace(
        costs.slower(factor), load_s=costs.load_s * factor, messaging=messaging
    )


# --------------------------------------------------------------------------------------------------
# Namespaces


@contextmanager
def testbed_of(
    given: argparse.Namespace, up: float | None = None, down: float | None = None
) -> Iterator[Any]:
    """Build the testbed of the arguments for a block, with other Mbit/s if they are given."""
    spec = importlib.util.spec_from_file_location("testbed", given.testbed)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{given.testbed}: no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    up, down = given.up if up is None else up, given.down if down is None else down
    with module.Testbed("fs", given.devices, 1, up, down, 0, 0) as testbed:
        yield testbed


def profiled(given: argparse.Namespace) -> dict[str, Any]:
    """Return this machine as ``fedsys profile`` measures it, with messages over the testbed."""
    with tempfile.TemporaryDirectory() as temporary, testbed_of(given) as testbed:
        folder, place = Path(temporary), testbed.ip("edge0")
        authority = Authority.create()
        authority.issue("edge-0", [place], role="server").save(folder / "edge")
        authority.issue("device-0").save(folder / "device")
        address = f"grpc://{place}:9444"
        serving = ["json=true", f"profile.serve={address}", f"run.dir={folder / 'serving'}"]
        edge = testbed.popen(
            "edge0",
            [*FEDSYS, "profile", *serving, f"link.credentials={folder / 'edge'}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert edge.stderr is not None
            if "answering" not in edge.stderr.readline():
                raise SystemExit("the other end of the testbed's link did not start")
            words = [
                *("+bench=pipeline", "num_clients=1", "fleet=local", "profile.name=host"),
                *(f"data.examples={_examples(given, 100)}", f"run.dir={folder / 'profile'}"),
                *(f"profile.edge={address}", f"link.credentials={folder / 'device'}", "json=true"),
            ]
            measuring = testbed.popen(
                "device0", [*FEDSYS, "profile", *words], stdout=subprocess.PIPE, text=True
            )
            told, _ = measuring.communicate(timeout=300)
        finally:
            edge.terminate()
            edge.communicate()
    if measuring.returncode:
        raise SystemExit("fedsys profile failed on the testbed; see its message above")
    print(json.loads(told.splitlines()[-1])["summary"], file=sys.stderr, flush=True)
    machine: dict[str, Any] = json.loads(told.splitlines()[-1])["fleet"]["machines"]["host"]
    return machine


def on_testbed(given: argparse.Namespace, config: Config) -> float:
    """Return the median seconds of an iteration of the devices."""
    with tempfile.TemporaryDirectory() as folder, testbed_of(given) as testbed:
        return _between(given, config, testbed, Path(folder))


def slowness(given: argparse.Namespace, load: Workload) -> float:
    """Return how many times as long the whole model takes within the quota of a device.

    Args:
        given: The arguments.
        load: Devices that are as fast as this machine.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        testbed_of(given) as testbed,
        started(given, _config(given, "none"), testbed, Path(folder)) as devices,
    ):
        took = [float(told["seen"]["iteration-s"]) for told in _round(given, testbed, devices)]
    whole = [Assignment(load.units, 0)] * given.devices
    return fmean(took) / fmean(evaluate(load, whole).iteration_s)


@contextmanager
def started(
    given: argparse.Namespace, config: Config, testbed: Any, folder: Path, **values: Any
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the edge server and the devices, which wait before each round, for a block."""
    address = f"{testbed.ip('edge0')}:9443"
    authority = Authority.create()
    authority.issue("edge-0", [testbed.ip("edge0")], role="server").save(folder / "edge")
    authority.issue("server").save(folder / "server")
    edge = testbed.popen(
        "edge0",
        [
            *(*FEDSYS, "edge", "json=true", "edge.http=null"),
            *(f"edge.address=grpc://{address}", f"edge.credentials={folder / 'edge'}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    processes = [edge]
    try:
        said(edge)
        for index in range(given.devices):
            text = _device_config(config, index, address, folder, **values)
            processes.append(_device_process(testbed, f"device{index}", text, folder))
        yield processes[1:]
    finally:
        for process in processes:
            process.terminate()
            process.communicate()


def _device_config(config: Config, index: int, address: str, folder: Path, **values: Any) -> str:
    """Return the configuration of a device whose only edge server is at an address."""
    own: dict[str, Any] = {
        "seed": index,
        "json": True,
        "run": {"dir": str(folder / f"device{index}")},
        "link": {"kind": "grpc", "credentials": str(folder / "server")},
        "fleet": {
            **values.get("fleet", {}),
            "edges": [{"name": "edge-0", "address": f"grpc://{address}"}],
        },
    }
    return configuration.with_values(config.text, **{**values, **own})


def _device_process(testbed: Any, name: str, text: str, folder: Path) -> subprocess.Popen[str]:
    file = folder / f"{name}.yaml"
    file.write_text(text)
    process: subprocess.Popen[str] = testbed.popen(
        name,
        [sys.executable, os.path.abspath(__file__), "_device", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process


def _round(
    given: argparse.Namespace,
    testbed: Any,
    devices: list[subprocess.Popen[str]],
    rate: float | None = None,
) -> list[dict[str, Any]]:
    """Have devices train a round within their quotas; return what each says of it.

    Quotas, and another `rate` of the first one in Mbit/s, hold while they train: what their server
    apps say to the edge before and after has no such device in between.
    """
    names = [f"device{i}" for i in range(given.devices)]
    for process in devices:
        said(process)
    for name in names:
        testbed.set_cpu(name, given.cpu)
    if rate is not None:
        testbed.shape(names[0], rate, rate)
    for process in devices:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = []
    for name, process in zip(names, devices, strict=True):
        told.append(json.loads(said(process)))
        if rate is not None and name == names[0]:
            testbed.shape(name, given.up, given.down)
    for name in names:
        testbed.set_cpu(name, 0)
    return told


def _between(given: argparse.Namespace, config: Config, testbed: Any, folder: Path) -> float:
    with started(given, config, testbed, folder) as devices:
        ends = [told["ends"] for told in _round(given, testbed, devices)]
    # the first mini-batch and the last, which may be smaller, do not count
    return median(b - a for e in ends for a, b in pairwise(e[:-1]))


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line of a process of the testbed; end if it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a process on the testbed ended early; see its messages above")
    return line


def device(words: list[str]) -> None:
    """Be one device of the testbed: wait before each round, and tell what was seen in it."""
    config = configuration.parse(Path(words[0]).read_text())
    server, client = load_apps(config)
    play_local(config, server, _Telling(client))


def profile(words: list[str]) -> None:
    """Be ``fedsys profile`` that waits once it has imported what it needs."""
    from fedsys.commands import profile as command  # torch, and all that measuring needs
    from fedsys.main import entry

    print(command.__name__, flush=True)
    sys.stdin.readline()
    sys.argv = ["fedsys", "profile", *words]
    entry()


class _Telling:
    """Waits before each round, and tells what was seen as soon as it is over."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __call__(self, message: Any, context: Any) -> Any:
        if message.metadata.message_type != "train":
            return self._client(message, context)
        print("ready", flush=True)
        sys.stdin.readline()
        asked = dict(message.content.config_records.get(ASSIGNMENT, {}))
        pieces = settings_of(message.content).micro_batches
        watching = Watching(self._client)
        reply = watching(message, context)
        seen = reply.content.config_records[OBSERVATION] if reply.has_content() else {}
        watch = watching.watch
        cpu_s = watch.device_cpu_s / max(1, watch.steps)
        told = {
            "ends": watch.ends.get(0, []),
            "cpu": cpu_s,
            "cut": asked.get("cut"),
            "pieces": pieces,
        }
        print(json.dumps({**told, "seen": dict(seen)}), flush=True)
        return reply


# --------------------------------------------------------------------------------------------------
# Policies that decide


def decided(
    given: argparse.Namespace, kind: str, load: Workload, host: Mapping[str, Any], factor: float
) -> list[dict[str, Any]]:
    """Return what a policy did in each round, beside what the model of time says of it."""
    rows: list[dict[str, Any]] = []
    network = load.devices[0].network
    values = {
        "rounds": given.rounds,
        "runtime": {"kind": "deployment"},  # what is measured counts, not a virtual clock
        "network": {
            "name": "testbed",
            "up_mbit_s": network.up_bits_s / 1e6,
            "down_mbit_s": network.down_bits_s / 1e6,
        },
        "fleet": _machines(host, factor),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        testbed_of(given) as testbed,
        started(given, _config(given, kind), testbed, Path(folder), **values) as devices,
    ):
        for number in range(1, given.rounds + 1):
            changed = given.change_at <= number < (given.back_at or given.rounds + 1)
            rate = given.change_to if changed else None
            for index, one in enumerate(_round(given, testbed, devices, rate)):
                own = given.up if rate is None or index else rate
                rows.append({"round": number, "device": index, **_judged(given, load, own, one)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        for process in devices:
            process.wait(timeout=300)  # what it decided is written down at its end
        why = [_reasons(Path(folder) / f"device{i}") for i in range(given.devices)]
    return [{**row, "reason": why[row["device"]].get(row["round"], "")} for row in rows]


def _reasons(run: Path) -> dict[int, str]:
    """Return the sentence about each decision of a device's own run, by round."""
    with (run / "decisions.csv").open(encoding="utf-8", newline="") as file:
        return {int(row["round"]): row["reason"] for row in csv.DictReader(file)}


def _policy(given: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Return the options of a policy; links that are not used are tried in every second round."""
    same = {"codec": given.codec, "micro_batches": given.micro_batches}
    if kind == "none":
        return {}
    if kind == "fixed":
        return {**same, "cut": given.cut}
    if kind == "fedadapt":
        agent = {"agent": str(given.agent.resolve())} if given.agent else {"ppo": {"updates": 0}}
        return {**same, **agent, "probe_every": 1}
    return {**same, "objective": "iteration", "forget": 1}


def _judged(
    given: argparse.Namespace, load: Workload, mbit_s: float, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare a round of a device with what is predicted for its rate, and with the best cut."""
    rate = mbit_s * 1e6 * PAYLOAD
    count = load.batch_size * (given.iterations + 3)
    mine = dataclasses.replace(load.devices[0], network=Network(rate, rate), examples=count)
    alone = dataclasses.replace(load, devices=(mine,))
    whole = told["cut"] is None
    cut = load.units if whole else int(told["cut"])
    pieces = 1 if whole else told["pieces"]
    chosen = Assignment(cut, 0, given.codec, given.codec, pieces)
    predicted = evaluate(alone, [chosen]).iteration_s[0]
    best = plan(alone, "exhaustive")
    measured = float(told["seen"].get("iteration-s", 0.0))
    return {
        "mbit_s": mbit_s,
        "cut": None if whole else cut,
        "pieces": pieces,
        "measured_s": measured,
        "predicted_s": predicted,
        "cpu_s": told["cpu"],
        "best_cut": None if best.choices[0].cut == load.units else best.choices[0].cut,
        "best_s": best.iteration_s[0],
        "regret": measured / best.iteration_s[0] - 1,
        "predicted_regret": predicted / best.iteration_s[0] - 1,
        "seen_mbit_s": [
            1e-6 / told["seen"][way] if told["seen"].get(way) else None
            for way in ("up-bit-s", "down-bit-s")
        ],
        "probe_bytes": told["seen"].get("probe-bytes", 0),
    }


def _machines(host: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a fleet of devices that are this machine, slower, and of edge servers like it."""
    slow = {
        **host,
        **{k: _times(host[k], factor) for k in ("forward_s", "backward_s", "update_s", "byte_s")},
        **{k: host.get(k, 0.0) * factor for k in ("load_s", "message_s", "operation_s")},
    }
    return {"machines": {"slow": slow, "host": host}, "devices": ["slow"], "servers": ["host"]}


# --------------------------------------------------------------------------------------------------
# Emulation


def emulate(
    given: argparse.Namespace,
    config: Config,
    load: Workload,
    host: Mapping[str, Any],
    factor: float,
) -> float:
    """Return the median seconds of an iteration with shaped links and machines that wait."""
    network = load.devices[0].network
    with tempfile.TemporaryDirectory() as folder, edge_process() as edge:
        watch, _ = watched_round(
            config,
            edge,
            num_clients=given.devices,
            data={"examples": config.data["examples"] * given.devices},
            run={"dir": str(Path(folder) / "run"), "plots": False},
            link={"kind": "grpc"},
            network={
                "name": "testbed",
                "up_mbit_s": network.up_bits_s / 1e6,
                "down_mbit_s": network.down_bits_s / 1e6,
                "latency_ms": 0.0,
                "emulate": True,
            },
            fleet={**_machines(host, factor), "emulate": True},
        )
        return median(watch.iterations(given.iterations))


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, Mapping):
        return {key: _times(inner, factor) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_times(inner, factor) for inner in value]
    return value * factor


if __name__ == "__main__":
    main()
