"""Predicted, emulated and real: split training between network namespaces, where nothing sleeps.

    sudo python benchmarks/on_testbed.py --testbed PATH/testbed.py --cpu 0.25 --up 10 --down 25

A testbed is a Python file with a class ``Testbed(name, devices, edges, up_mbps, down_mbps, cpu,
edge_cpu, period_ms)``: a context manager with ``ip(node)``, ``popen(node, argv, …)`` and
``set_cpu(node, cores)`` for the nodes ``edge0``, ``device0``, ``device1`` …, whose links the kernel
shapes and whose processes share a quota of processor time.

1. This machine is profiled, as ``fedsys profile`` does; a device is the same machine, slower by its
   quota. What the model predicts is printed before anything runs.
2. ``fedsys edge`` runs in one namespace, a device with its own server app in each of the others,
   over mutual TLS. Quotas are set when all are ready to train.
3. The same setting is emulated: shaped links on loopback, devices and edge slowed by waiting.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fedsys import config as configuration
from fedsys.commands.bench.rounds import Watching, edge_process, watched_round
from fedsys.commands.profile import OPTIONS, profile
from fedsys.config import Config
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import MachineCosts, Messaging
from fedsys.planning.hardware import machine_costs
from fedsys.planning.planner import evaluate
from fedsys.planning.workload import Device, Workload, workload
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import play_local
from fedsys.training import federation
from fedsys.training.federation import layered_model
from fedsys.transport.network import Network
from fedsys.transport.security import Authority

PAYLOAD = 0.956
"""Share of an Ethernet frame of 1514 bytes that is payload of TCP."""


def main() -> None:
    """Profile, predict, run, emulate, compare."""
    if sys.argv[1:2] == ["_device"]:
        return device(Path(sys.argv[2]))
    given = _arguments()
    config = _config(given)
    fed = federation.federation(config)
    layers = layered_model(config, fed.dataset.input_shape, fed.dataset.num_classes)
    found = profile(config, {**OPTIONS, "name": "host"})["fleet"]["machines"]["host"]
    host = machine_costs("host", found, layers)
    slow = slowed(host, 1.0 / given.cpu)
    network = Network(given.up * 1e6 * PAYLOAD, given.down * 1e6 * PAYLOAD)
    choice = Assignment(given.cut, 0, given.codec, given.codec, given.micro_batches)
    load = workload(
        layers,
        [Device(f"device{i}", slow, network, 1) for i in range(given.devices)],
        [host],
        config.client.batch_size,
        micro_batches=[choice.pieces],
        codecs=[choice.codec_up],
        exchange=False,
    )
    predicted = max(evaluate(load, [choice] * given.devices).iteration_s)
    print(f"predicted {predicted:.3f} s", file=sys.stderr, flush=True)
    real = on_testbed(given, config)
    print(f"measured {real:.3f} s", file=sys.stderr, flush=True)
    emulated = emulate(given, config, load, found)
    result = {
        **{k: v for k, v in vars(given).items() if k != "testbed"},
        "predicted_s": predicted,
        "testbed_s": real,
        "emulated_s": emulated,
        "prediction_error": predicted / real - 1,
        "emulation_error": emulated / real - 1,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result))


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
    return parser.parse_args()


def _config(given: argparse.Namespace) -> Config:
    text = configuration.compose_text("+bench=pipeline run.plots=false")
    base = configuration.parse(text)
    wanted = base.client.batch_size * (given.iterations + 3)
    values: dict[str, Any] = {
        "num_clients": 1,
        "data": {"examples": round(wanted / 0.9)},
        "policy": {
            "kind": "fixed",
            "cut": given.cut,
            "codec": given.codec,
            "micro_batches": given.micro_batches,
        },
        "fleet": {"machines": {}, "devices": [], "servers": []},
    }
    return configuration.parse(configuration.with_values(text, **values))


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


def on_testbed(given: argparse.Namespace, config: Config) -> float:
    """Return the median seconds of an iteration of the devices."""
    spec = importlib.util.spec_from_file_location("testbed", given.testbed)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{given.testbed}: no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (
        tempfile.TemporaryDirectory() as folder,
        module.Testbed("fs", given.devices, 1, given.up, given.down, 0, 0) as testbed,
    ):
        return _between(given, config, testbed, Path(folder))


def _between(given: argparse.Namespace, config: Config, testbed: Any, folder: Path) -> float:
    address = f"{testbed.ip('edge0')}:9443"
    authority = Authority.create()
    authority.issue("edge-0", [testbed.ip("edge0")], role="server").save(folder / "edge")
    authority.issue("server").save(folder / "server")
    edge = testbed.popen(
        "edge0",
        [
            *(sys.executable, "-m", "fedsys.main", "edge", "json=true", "edge.http=null"),
            *(f"edge.address=grpc://{address}", f"edge.credentials={folder / 'edge'}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    names = [f"device{i}" for i in range(given.devices)]
    processes = [edge]
    try:
        _said(edge)
        devices = []
        for index, name in enumerate(names):
            values: dict[str, Any] = {
                "seed": index,
                "json": True,
                "run": {"dir": str(folder / name)},
                "link": {"kind": "grpc", "credentials": str(folder / "server")},
                "fleet": {"edges": [{"name": "edge-0", "address": f"grpc://{address}"}]},
            }
            file = folder / f"{name}.yaml"
            file.write_text(configuration.with_values(config.text, **values))
            devices.append(
                testbed.popen(
                    name,
                    [sys.executable, os.path.abspath(__file__), "_device", str(file)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        processes += devices
        for process in devices:
            _said(process)
        for name in names:
            testbed.set_cpu(name, given.cpu)
        for process in devices:
            process.stdin.write("go\n")
            process.stdin.flush()
        ends = [json.loads(_said(process))["ends"] for process in devices]
        for name in names:
            testbed.set_cpu(name, 0)
        # the first mini-batch and the last, which may be smaller, do not count
        return median(b - a for e in ends for a, b in pairwise(e[:-1]))
    finally:
        for process in processes:
            process.terminate()
            process.communicate()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a process on the testbed ended early; see its messages above")
    return line


def device(file: Path) -> None:
    """Be one device of the testbed: wait before training, and tell when each mini-batch ended."""
    config = configuration.parse(file.read_text())

    def ready() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    server, client = load_apps(config)
    watching = Watching(client, ready=ready)
    play_local(config, server, _Telling(watching))


class _Telling:
    """Tells what was seen as soon as the training is over."""

    def __init__(self, watching: Watching) -> None:
        self._watching = watching

    def __call__(self, message: Any, context: Any) -> Any:
        reply = self._watching(message, context)
        if message.metadata.message_type == "train":
            print(json.dumps({"ends": self._watching.watch.ends[0]}), flush=True)
        return reply


# --------------------------------------------------------------------------------------------------
# Emulation


def emulate(
    given: argparse.Namespace, config: Config, load: Workload, host: Mapping[str, Any]
) -> float:
    """Return the median seconds of an iteration with shaped links and machines that wait."""
    factor = 1.0 / given.cpu
    slow = {
        **host,
        **{k: _times(host[k], factor) for k in ("forward_s", "backward_s", "update_s", "byte_s")},
        **{k: host.get(k, 0.0) * factor for k in ("load_s", "message_s", "operation_s")},
    }
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
            fleet={
                "machines": {"slow": slow, "host": host},
                "devices": ["slow"],
                "servers": ["host"],
                "emulate": True,
            },
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
