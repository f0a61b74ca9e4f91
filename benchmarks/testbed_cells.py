"""Split training against PiPar, cell by cell, on namespaces: ``on_testbed.py --cells``.

    git worktree add ../base bde1fc2
    sudo python benchmarks/on_testbed.py --testbed PATH/testbed.py --devices 4 \
        --images CIFAR10/train --base ../base --iterations 10 --beside --cells

A cell is a quota of a device's processor and a network of ``conf/network``. Four devices train
VGG-5 on real images, with mini-batches of 100, beside one edge server:

1. ``classic``: all on the devices, as the cell's rival trains it in plain federated learning.
2. ``fp32`` and ``int8``: the plan that ``auto`` makes. Its costs are those that ``fedsys profile``
   measures on ``device0`` within the quota and over the shaped link with certificates, slower by as
   much as step 1 took longer than its passes; and on the edge server's node without a quota, with
   what the devices leave of the cores.
3. ``base``: classic of another checkout, by which the rival's figures are scaled to this machine,
   and its processor time at cut 1 with int8.

Seconds of an iteration are those of the slowest device, the median of its own. Processor time is
that of a device's control group, between the ends of its mini-batches. PiPar's figures are those of
its reference implementation on the same work, which were measured on another machine together with
classic training of bde1fc2. With ``--keep FILE`` what was measured is kept, and a run with the same
file goes on from there.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import on_testbed as bed

from fedsys import config as configuration
from fedsys.commands.bench.sampling import sampled
from fedsys.config import Config
from fedsys.models.layers import LayeredModel
from fedsys.planning.assignment import Assignment
from fedsys.planning.costs import MachineCosts
from fedsys.planning.hardware import machine_costs
from fedsys.planning.planner import evaluate, plan
from fedsys.planning.workload import Device, Workload, workload
from fedsys.training.federation import federation, layers_of
from fedsys.transport.network import Network
from fedsys.transport.security import Authority

HERE = Path(__file__).resolve().parent.parent
DEVICE = Path(__file__).with_name("testbed_device.py")

LINKS = ("wifi", "4g_plus", "4g")

PREDICTION, CLASSIC, FP32_WIFI, CPU = 0.10, 1.03, 1.6, 0.45
"""Goals: how far off a prediction may be, `auto` over classic, times as fast as PiPar with fp32 at
10 % over Wi-Fi, and the processor time of a device at cut 1 with int8 over that of the base."""

BATCH = 100
BEFORE = 2
"""Mini-batches of a device before those that count: a pipeline is not yet full in the first."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """Seconds of an iteration in a cell, all on the same other machine.

    Attributes:
        pipar_s: PiPar's reference implementation, at its best setting.
        classic_s: Its plain federated learning.
        base_s: Classic training of bde1fc2.
        goal: How many times as fast as PiPar `auto` with int8 shall be; 0 for no goal.
    """

    pipar_s: float
    classic_s: float
    base_s: float
    goal: float


RIVALS: Mapping[tuple[int, str], Rival] = {
    (10, "wifi"): Rival(1.16, 1.42, 1.23, 3.5),
    (10, "4g_plus"): Rival(1.58, 1.39, 1.27, 3.5),
    (10, "4g"): Rival(1.64, 1.43, 1.36, 2.2),
    (25, "wifi"): Rival(0.61, 0.60, 0.48, 2.2),
    (25, "4g_plus"): Rival(0.56, 0.54, 0.44, 1.4),
    (25, "4g"): Rival(0.84, 0.78, 0.72, 0.0),
}
"""By quota in percent, and network."""


def cell_of(text: str) -> tuple[int, str]:
    """Return the cell that ``10:wifi`` names.

    >>> cell_of("25:4g_plus")
    (25, '4g_plus')

    Raises:
        ValueError: There is no such cell.
    """
    quota, _, link = text.partition(":")
    if not quota.isdigit() or (int(quota), link) not in RIVALS:
        raise ValueError(f"{text}: must be one of {', '.join(f'{q}:{n}' for q, n in RIVALS)}")
    return int(quota), link


def busy_s(samples: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Return the processor time between two moments.

    Args:
        samples: Moments, ascending, and the processor time until then; in between it is
            interpolated, before the first and after the last it is theirs.
        begin: A moment.
        end: One after it.

    >>> busy_s([(0.0, 0.0), (1.0, 0.5), (3.0, 0.5)], 0.5, 2.0)
    0.25
    """

    def at(moment: float) -> float:
        right = bisect.bisect([when for when, _ in samples], moment)
        if right in (0, len(samples)):
            return samples[min(right, len(samples) - 1)][1]
        (a, low), (b, high) = samples[right - 1], samples[right]
        return low + (high - low) * (moment - a) / (b - a)

    return at(end) - at(begin)


def judged(
    cell: tuple[int, str], base_s: float, classic_s: float, seen: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the ratios and goals of a cell.

    Args:
        cell: Quota in percent, and network.
        base_s: Seconds of an iteration of classic training of bde1fc2 here.
        classic_s: Of our own.
        seen: By codec, ``measured_s`` and ``predicted_s`` of the plan of `auto`.
    """
    rival = RIVALS[cell]
    pipar_s = rival.pipar_s * base_s / rival.base_s
    made: dict[str, Any] = {"pipar_s": pipar_s}
    for codec, one in seen.items():
        took = one["measured_s"]
        goal = rival.goal if codec == "int8" else FP32_WIFI * (cell == (10, "wifi"))
        made[codec] = {
            "times_as_fast": pipar_s / took,
            "goal": goal,
            "by_classic": took / classic_s,
            "off": one["predicted_s"] / took - 1,
            "met": {
                "pipar": pipar_s / took >= goal,
                "classic": took <= CLASSIC * classic_s,
                "prediction": abs(one["predicted_s"] / took - 1) <= PREDICTION,
            },
        }
    return made


def in_words(choices: Sequence[Sequence[Any]], units: int) -> str:
    """Return cuts and pieces of assignments, each kind once, with how many devices have it.

    >>> in_words([[1, 10], [1, 10], [5, 1]], 5)
    '2 × (1, 10), alone'
    """
    found: dict[str, int] = {}
    for cut, pieces in choices:
        word = "alone" if cut >= units else f"({cut}, {pieces})"
        found[word] = found.get(word, 0) + 1
    alike = len(found) == 1
    return ", ".join(f"{n} × {w}" if n > 1 and not alike else w for w, n in found.items())


def as_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines of a Markdown table of cells; times in seconds."""
    head = (
        *("cell", "PiPar", "classic", "codec", "cut, pieces", "predicted", "measured", "off"),
        *("by classic", "of PiPar's speed", "goal", "device CPU", "load"),
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell in cells:
        first = [
            f"{cell['quota']} %, {cell['link']}",
            *(f"{cell[key]:.3f}" for key in ("pipar_s", "classic_s")),
        ]
        for codec in ("fp32", "int8"):
            one, told = cell["seen"][codec], cell[codec]
            goal = f"{told['goal']:.1f}" if told["goal"] else ""
            words = [
                in_words(one["choices"], cell["units"]),
                f"{one['predicted_s']:.3f}",
                f"{one['measured_s']:.3f}",
                f"{told['off']:+.0%}" + ("" if told["met"]["prediction"] else " **missed**"),
                f"{told['by_classic']:.2f}" + ("" if told["met"]["classic"] else " **missed**"),
                f"{told['times_as_fast']:.2f}",
                goal + ("" if told["met"]["pipar"] else " **missed**"),
                f"{one['cpu_s']:.4f}",
                f"{one['load']:.1f}",
            ]
            lines.append("| " + " | ".join([*first, codec, *words]) + " |")
            first = [""] * len(first)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Trained for real


@dataclasses.dataclass(frozen=True)
class Version:
    """A checkout, and how it is asked to train.

    Attributes:
        root: Its folder.
        words: Options of its configuration.
        link: Kind of its links to the edge server.
    """

    root: Path
    words: tuple[str, ...]
    link: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its processes."""
        return {**os.environ, "PYTHONPATH": str(self.root)}

    def composed(self, values: Mapping[str, Any], more: Sequence[str] = ()) -> str:
        """Return the YAML of a run of that checkout."""
        code = (
            "import json, sys\nfrom fedsys import config as c\n"
            "given = json.load(sys.stdin)\n"
            "print(c.with_values(c.compose_text(given['words']), **given['values']))"
        )
        words = " ".join(["+bench=pipeline", "run.plots=false", *self.words, *more])
        return subprocess.run(
            [sys.executable, "-c", code], input=json.dumps({"words": words, "values": values}),
            capture_output=True, text=True, check=True, env=self.environment, cwd=self.root,
        ).stdout  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Seen:
    """What devices took.

    Attributes:
        measured_s: Seconds of an iteration of the slowest device.
        each_s: Of each device, the median of its iterations.
        cpu_s: Processor time of an iteration of a device, the mean over devices.
        edge_cpu_s: Of the edge server, for an iteration of all of them.
        load: Of the machine, when they ended.
    """

    measured_s: float
    each_s: tuple[float, ...]
    cpu_s: float
    edge_cpu_s: float
    load: float


def trained(
    given: argparse.Namespace, version: Version, cell: tuple[int, str],
    choices: Sequence[Assignment] | None,
) -> Seen:  # fmt: skip
    """Return what an iteration takes on the testbed.

    Args:
        given: The arguments.
        version: What trains.
        cell: Quota in percent, and network.
        choices: Of each device; None: the whole model.
    """
    with (
        tempfile.TemporaryDirectory() as temporary,
        bed.testbed_of(given, *rates(cell[1])) as testbed,
    ):
        folder = Path(temporary)
        address = f"{version.link}://{testbed.ip('edge0')}:9443"
        authority = Authority.create()
        authority.issue("edge-0", [testbed.ip("edge0")], role="server").save(folder / "edge")
        authority.issue("server").save(folder / "server")
        words = ["edge", "json=true", "edge.http=null", f"edge.address={address}"]
        words += [f"edge.credentials={folder / 'edge'}"]
        processes = [started(testbed, "edge0", [*bed.FEDSYS, *words], version, folder)]
        try:
            bed.said(processes[0])
            for index in range(given.devices):
                choice = choices[index] if choices else None
                values = _values(given, version, index, choice, address, folder)
                policy = "none" if choice is None else "fixed"
                file = folder / f"device{index}.yaml"
                file.write_text(version.composed(values, [f"policy={policy}"]))
                command = [sys.executable, str(DEVICE), str(file)]
                processes.append(started(testbed, f"device{index}", command, version, folder))
            return _watched(given, testbed, processes[1:], cell[0] / 100)
        except SystemExit:
            for log in folder.glob("*.log"):
                print(log.name, log.read_text()[-500:], file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.terminate()
                process.communicate()


def started(
    testbed: Any, node: str, command: Sequence[str], version: Version, folder: Path
) -> subprocess.Popen[str]:
    """Start a process of a checkout on a node; what it says goes to ``NODE.log`` in a folder."""
    with (folder / f"{node}.log").open("w") as log:
        process: subprocess.Popen[str] = testbed.popen(
            node, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, env=version.environment, cwd=version.root,
        )  # fmt: skip
    return process


def _values(
    given: argparse.Namespace, version: Version, index: int, choice: Assignment | None,
    address: str, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    values: dict[str, Any] = {
        "num_clients": 1,
        "seed": index,
        "json": True,
        "run": {"dir": str(folder / f"device{index}")},
        "link": {"kind": version.link, "credentials": str(folder / "server")},
        "fleet": {
            **{"machines": {}, "devices": [], "servers": []},
            "edges": [{"name": "edge-0", "address": address}],
        },
    }
    if choice is not None:
        values["policy"] = {
            **{"cut": choice.cut, "micro_batches": choice.micro_batches},
            "codec": choice.codec_up,
        }
        if choice.cut >= given.units:  # a planner may leave one of the devices alone
            values["policy"] = {"cut": 1.0}
    return values


def _watched(
    given: argparse.Namespace, testbed: Any, devices: Sequence[subprocess.Popen[str]], cores: float
) -> Seen:
    names = [f"device{index}" for index in range(given.devices)]
    for process in devices:
        bed.said(process)
    for name in names:
        testbed.set_cpu(name, cores)
    with used(testbed, [*names, "edge0"]) as samples:
        for process in devices:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ends = [json.loads(bed.said(process))["ends"] for process in devices]
    for name in names:
        testbed.set_cpu(name, 0)
    # the last mini-batch may be smaller; when one device is done the others have more of the edge
    until = min(own[-2] for own in ends)
    counted = [[end for end in own[BEFORE - 1 :] if end <= until] for own in ends]
    cpu = [
        busy_s(samples[name], own[0], own[-1]) / (len(own) - 1)
        for name, own in zip(names, counted, strict=True)
    ]
    each = tuple(median(b - a for a, b in pairwise(own)) for own in counted)
    steps = fmean(len(own) - 1 for own in counted)
    edge = busy_s(samples["edge0"], max(own[0] for own in counted), until) / steps
    return Seen(max(each), each, fmean(cpu), edge, os.getloadavg()[0])


@contextmanager
def used(testbed: Any, names: Sequence[str]) -> Iterator[dict[str, list[tuple[float, float]]]]:
    """Note for a block, every 50 ms, what processor time nodes have used, in seconds.

    Ends of mini-batches are moments of the same clock, that of the machine.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def note() -> None:
        for name in names:
            found[name].append((time.monotonic(), testbed.counters(name)["cpu_seconds"]))

    note()
    with sampled(note, 0.05):
        yield found


def rates(link: str) -> tuple[float, float]:
    """Return the Mbit/s of a network of ``conf/network``, up and down."""
    network = configuration.parse(configuration.compose_text(f"network={link}")).network
    if network.up_mbit_s is None or network.down_mbit_s is None:
        raise SystemExit(f"network={link} has no rates")
    return network.up_mbit_s, network.down_mbit_s


# --------------------------------------------------------------------------------------------------
# Planned


def profiled(
    given: argparse.Namespace, version: Version, link: str, node: str, cores: float
) -> dict[str, Any]:
    """Return what ``fedsys profile`` says of a node, over its link with certificates.

    Args:
        given: The arguments.
        version: What is profiled.
        link: Network of the devices.
        node: Of the testbed; it measures to ``edge0``, or that one to ``device1``.
        cores: Quota of the node; 0: none.

    Returns:
        The machine of the profile, and its ``link``: Mbit/s each way.
    """
    other = "device1" if node == "edge0" else "edge0"
    with (
        tempfile.TemporaryDirectory() as temporary,
        bed.testbed_of(given, *rates(link)) as testbed,
    ):
        folder, place = Path(temporary), testbed.ip(other)
        authority = Authority.create()
        authority.issue("there", [place], role="server").save(folder / "there")
        authority.issue("here").save(folder / "here")
        address = f"{version.link}://{place}:9444"
        serving = ["json=true", f"profile.serve={address}", f"run.dir={folder / 'serving'}"]
        serving += [f"link.credentials={folder / 'there'}"]
        answering = started(testbed, other, [*bed.FEDSYS, "profile", *serving], version, folder)
        words = [
            *("+bench=pipeline", "num_clients=1", "fleet=local", "profile.name=host"),
            *(*version.words, f"run.dir={folder / 'profile'}", f"profile.edge={address}"),
            *(f"profile.repeats={given.repeats}", f"profile.quota={cores or 'null'}"),
            *("json=true", f"link.credentials={folder / 'here'}"),
        ]
        command = [sys.executable, bed.__file__, "_profile", *words]
        try:
            measuring = started(testbed, node, command, version, folder)
            bed.said(measuring)  # it has imported what it needs
            while "answering" not in (folder / f"{other}.log").read_text():
                if answering.poll() is not None:
                    raise SystemExit("the other end of the testbed's link did not start")
                time.sleep(0.1)
            testbed.set_cpu(node, cores)
            told, _ = measuring.communicate("go\n", timeout=300)
        finally:
            testbed.set_cpu(node, 0)
            answering.terminate()
            answering.communicate()
        if measuring.returncode:
            raise SystemExit(f"fedsys profile: {(folder / f'{node}.log').read_text()[-500:]}")
    result = json.loads(told.splitlines()[-1])
    print(result["summary"], file=sys.stderr, flush=True)
    measured = {way: result[f"{way}_mbit_s"] for way in ("up", "down")}
    return {"machine": result["fleet"]["machines"]["host"], "rates": measured}


def planned(
    given: argparse.Namespace, config: Config, layers: LayeredModel, cell: tuple[int, str],
    own: Mapping[str, Any], edge: Mapping[str, Any], codec: str, classic_s: float,
) -> tuple[Workload, tuple[Assignment, ...], float]:  # fmt: skip
    """Return the workload of a cell, the plan of `auto`, and its predicted seconds.

    Steps of training take more than the profile's passes in a row, by as much as the whole model
    does: `classic_s` was measured, as in the other modes of this benchmark.
    """
    mine = machine_costs("device", own["machine"], layers, config.client)
    there = machine_costs("edge", edge["machine"], layers, config.client)
    there = sharing(there, os.cpu_count() or 1, given.devices * cell[0] / 100)
    network = Network(1e6 * own["rates"]["up"], 1e6 * own["rates"]["down"])
    devices = [Device(f"device{i}", mine, network, BATCH * 20) for i in range(given.devices)]
    load = workload(layers, devices, [there], BATCH, codecs=[codec], exchange=False)
    whole = evaluate(load, [Assignment(load.units, 0)] * given.devices).iteration_s
    slower = bed.slowed(mine, classic_s / max(whole))
    devices = [dataclasses.replace(device, costs=slower) for device in devices]
    load = dataclasses.replace(load, devices=tuple(devices))
    made = plan(load, "auto")
    return load, made.choices, max(made.iteration_s)


def sharing(edge: MachineCosts, cores: int, taken: float) -> MachineCosts:
    """Return what an edge server takes on a machine of which devices use some cores.

    Args:
        edge: What it takes alone.
        cores: Of the machine.
        taken: Cores' worth of time that devices use.
    """
    return bed.slowed(edge, cores / max(cores - taken, 0.1 * cores))


# --------------------------------------------------------------------------------------------------
# Cells


def cells(given: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of the cells that are asked for."""
    wanted = [cell_of(text) for text in given.cells] or list(RIVALS)
    kept = Kept(given.keep)
    with tempfile.TemporaryDirectory() as temporary:
        root = a_sample(given.images, Path(temporary) / "images", given.iterations + 3)
        data = (
            *("data=image_folder", f"data.root={root}", f"client.batch_size={BATCH}"),
            f"data.cache={temporary}/cache",
        )
        how = f"client.kernels={given.kernels}", f"client.memory_format={given.memory_format}"
        ours = Version(HERE, (*data, *how), given.link)
        base = Version(given.base.resolve(), data, given.link) if given.base else None
        config = configuration.parse(ours.composed({"num_clients": 1}))
        layers = layers_of(config, federation(config).dataset)
        given.units = len(layers)
        edge = kept.of("edge", lambda: profiled(given, ours, wanted[0][1], "edge0", 0))
        found = []
        for cell in wanted:
            alone = {}
            for name, version in (("classic", ours), ("base classic", base)):
                if version is not None:  # no link has a part in it
                    which = f"{name}, {cell[0]} %"
                    alone[name] = kept.of(which, functools.partial(seen, given, version, cell))
            found.append(_cell(given, kept, ours, config, layers, cell, edge, alone))
        beside = _beside(given, kept, ours, base, wanted[0]) if base and given.beside else {}
    print(as_table(found), file=sys.stderr)
    return {"cells": found, "cut_1_int8": beside, "load": os.getloadavg()[0]}


def seen(
    given: argparse.Namespace, version: Version, cell: tuple[int, str],
    choices: Sequence[Assignment] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return as plain values what an iteration takes on the testbed; see `trained`."""
    return dataclasses.asdict(trained(given, version, cell, choices))


class Kept:
    """What was measured, by name, in a file if there is one.

    Args:
        file: JSON, read if it is there; None: nothing is kept.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        there = file is not None and file.exists()
        self._found: dict[str, Any] = json.loads(file.read_text()) if file and there else {}

    def of(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what was measured under a name, or measure it now."""
        if name not in self._found:
            self._found[name] = measure()
            told = json.dumps(self._found[name])
            print(f"{time.strftime('%H:%M:%S')} {name}: {told}", file=sys.stderr, flush=True)
            if self._file is not None:
                self._file.write_text(json.dumps(self._found))
        return self._found[name]


def _cell(
    given: argparse.Namespace, kept: Kept, ours: Version, config: Config, layers: LayeredModel,
    cell: tuple[int, str], edge: Mapping[str, Any], alone: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    which, classic = f"{cell[0]} %, {cell[1]}", alone["classic"]
    own = kept.of(
        f"profile, {which}", lambda: profiled(given, ours, cell[1], "device0", cell[0] / 100)
    )
    found: dict[str, dict[str, Any]] = {}
    for codec in ("fp32", "int8"):
        load, choices, predicted = planned(
            given, config, layers, cell, own, edge, codec, classic["measured_s"]
        )
        told = [[choice.cut, choice.micro_batches] for choice in choices]
        whole = all(choice.cut == load.units for choice in choices)
        measure = functools.partial(seen, given, ours, cell, choices)
        took = classic if whole else kept.of(f"{which}, {codec}, {told}", measure)
        found[codec] = {"choices": told, "predicted_s": predicted, **took}
    base_s = alone["base classic"]["measured_s"] if "base classic" in alone else RIVALS[cell].base_s
    return {
        "quota": cell[0],
        "link": cell[1],
        "units": len(layers),
        "classic_s": classic["measured_s"],
        "classic_cpu_s": classic["cpu_s"],
        "base_classic_s": base_s,
        "profile": {**own["machine"], **own["rates"]},
        "edge": edge["machine"],
        "seen": found,
        **judged(cell, base_s, classic["measured_s"], found),
    }


def _beside(
    given: argparse.Namespace, kept: Kept, ours: Version, base: Version, cell: tuple[int, str]
) -> dict[str, Any]:
    """Return the processor time of a device at cut 1 with int8, of both checkouts in turns."""
    choices = [Assignment(1, 0, "int8", "int8", given.micro_batches)] * given.devices
    found: dict[str, list[float]] = {"ours": [], "base": []}
    for turn in (1, 2):
        for name, version in (("base", base), ("ours", ours)):
            measure = functools.partial(seen, given, version, cell, choices)
            which = f"cut 1, {given.micro_batches} pieces, int8, {name}, {turn}"
            found[name].append(kept.of(which, measure)["cpu_s"])
    ratio = fmean(found["ours"]) / fmean(found["base"])
    return {"pieces": given.micro_batches, **found, "ratio": ratio, "met": ratio <= CPU}


def a_sample(root: Path, folder: Path, batches: int) -> Path:
    """Link as many images as devices need into a folder of their own, as many of each class.

    Looking at all 60,000 files in each process would take most of the time of a cell.
    """
    classes = sorted(each for each in root.iterdir() if each.is_dir())
    each = -(-round(BATCH * batches / 0.9 / 0.8) // len(classes))
    for name in classes:
        (folder / name.name).mkdir(parents=True)
        for file in sorted(name.iterdir())[: each + 1]:
            (folder / name.name / file.name).symlink_to(file.resolve())
    return folder
