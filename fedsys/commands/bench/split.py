"""Split training over the memory link against the unsplit loop, and what a device holds.

Both are the clients of the product, which train one round of the same examples; edge and device are
threads of one process. They take turns: an unsplit round, then one round for each cut. Opening the
session is not counted, because the server app does it; that the halves give the bits of the whole
is checked in every turn.

The memory of a device is that of a process of its own, with the edge in another one: how far its
resident size rises above what it had before it got its part of the model. The first of two rounds
there warms up.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from safetensors.torch import load_file, save_file

from fedsys import config as configuration
from fedsys.commands.bench import Chart, with_quartiles
from fedsys.config import Config, EdgeAddress, locate
from fedsys.errors import RuntimeFailure
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import Fleet
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.planning.assignment import Assignment
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import layered_model, layers_of
from fedsys.training.part import names_between
from fedsys.transport import records
from fedsys.transport.addresses import dial
from fedsys.transport.messages import ARRAYS, ASSIGNMENT, CONFIG, Place, Settings, written
from fedsys.transport.security import new_token

State = Mapping[str, torch.Tensor]

_PEAK = Path("/proc/self/clear_refs")


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure in turns.

    Args:
        config: Data, model and client; the first client's examples are trained on.
        options: ``turns`` of each, ``memory`` (the cuts at which to measure that; None for
            all), and the names of the product's clients, ``local`` and ``offload``.

    Returns:
        ``cuts``: per cut the seconds of a round (median), the median and the quartiles of the
        turns' ratios to the unsplit round, whether the bits are those of the whole, and the peak
        memory of the device in MB (10^6 bytes) with its share of the unsplit one.

    Raises:
        RuntimeFailure: A device process failed.
    """
    training.set_threads(config.client.threads)
    fed = federation.federation(config)
    model = federation.build_model(config, fed.dataset)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = layers_of(config, fed.dataset)
    cuts = range(1, len(layers))
    took: dict[int, list[float]] = {cut: [] for cut in (0, *cuts)}
    same = dict.fromkeys(cuts, True)
    with _edge("memory://bench-split") as bench:
        split = _Split(config, options, state, bench)
        for turn in range(1 + int(options["turns"])):
            expected, seconds = _unsplit(config, options, state)
            took[0].append(seconds)
            for cut in cuts if turn % 2 else reversed(cuts):
                got, seconds = split.round(cut)
                took[cut].append(seconds)
                same[cut] &= all(torch.equal(got[n], x) for n, x in expected.items())
    weighed = (
        cuts if options["memory"] is None else [cut for cut in options["memory"] if cut in cuts]
    )
    peaks = _peaks(config, options, state, weighed) if weighed else {}
    rows = [_row(cut, layers.units[cut - 1].name, took, peaks) for cut in cuts]
    return {
        "unsplit_s": median(took[0][1:]),
        "unsplit_peak_mb": peaks.get(0),
        "worst_ratio": max(row["ratio"] for row in rows),
        "batch_size": config.client.batch_size,
        "turns": int(options["turns"]),
        "threads": torch.get_num_threads(),
        "cuts": [{**row, "same_bits": same[row["cut"]]} for row in rows],
    }


def _row(
    cut: int, unit: str, took: Mapping[int, list[float]], peaks: Mapping[int, float]
) -> dict[str, Any]:
    ratios = (s / w for s, w in zip(took[cut][1:], took[0][1:], strict=True))
    return {
        "cut": cut,
        "after": unit,
        "seconds": median(took[cut][1:]),
        **with_quartiles("ratio", ratios),
        "device_peak_mb": peaks.get(cut),
        "of_unsplit": peaks[cut] / peaks[0] if cut in peaks else None,
    }


def _content(state: State, more: Mapping[str, ConfigRecord]) -> RecordDict:
    settings = ConfigRecord(written(Settings(1)))
    return RecordDict({ARRAYS: records.to_record(dict(state)), CONFIG: settings, **more})


def _unsplit(
    config: Config, options: Mapping[str, Any], state: State
) -> tuple[dict[str, torch.Tensor], float]:
    client = locate(str(options["local"]), "bench.local")(config, 0)
    content = _content(state, {})
    began = time.perf_counter()
    reply = client.train(content)
    seconds = time.perf_counter() - began
    return records.from_record(reply[ARRAYS]), seconds


@dataclass(frozen=True)
class _Edge:
    fleet: Fleet
    address: str


@contextmanager
def _edge(address: str) -> Iterator[_Edge]:
    token = new_token()
    server = EdgeServer("bench", address, control_token=token)
    try:
        with Fleet([EdgeAddress("bench", server.address)], control_token=token) as fleet:
            yield _Edge(fleet, server.address)
    finally:
        server.stop(0.0)


class _Split:
    """Rounds of a device with its edge."""

    def __init__(
        self, config: Config, options: Mapping[str, Any], state: State, edge: _Edge
    ) -> None:
        self._config, self._options, self._state, self._edge = config, options, state, edge
        dataset = federation.federation(config).dataset
        self._shape, self._classes = dataset.input_shape, dataset.num_classes
        self._layers = layered_model(config, self._shape, self._classes)

    def round(self, cut: int) -> tuple[dict[str, torch.Tensor], float]:
        """Return the model after a round at a cut, and the seconds that the device took."""
        client = locate(str(self._options["offload"]), "bench.offload")
        with self.session(cut) as (content, collect):
            device = client(self._config, 0, content, dial)
            began = time.perf_counter()
            reply = device.train()
            seconds = time.perf_counter() - began
            return {**records.from_record(reply[ARRAYS]), **collect()}, seconds

    @contextmanager
    def session(self, cut: int) -> Iterator[tuple[RecordDict, Callable[[], State]]]:
        """Open a session; yield the device's message, and what fetches the edge's state."""
        _, mine = names_between(self._layers, [cut])
        spec = SessionSpec(
            id=new_token(),
            token=new_token(),
            client=0,
            round=1,
            first=cut,
            last=len(self._layers),
            config=self._config.text,
            input_shape=self._shape,
            num_classes=self._classes,
            micro_batches=self._config.schedule.micro_batches,
        )
        start = Snapshot(0, {n: x for n, x in self._state.items() if n in mine}, {})
        self._edge.fleet.open(spec, start, "bench")
        place = Place(len(self._layers), spec.id, spec.token, (self._edge.address,))
        assignment = {**Assignment(cut).to_record(), **written(place)}
        theirs = {n: x for n, x in self._state.items() if n not in mine}
        try:
            yield (
                _content(theirs, {ASSIGNMENT: ConfigRecord(assignment)}),
                lambda: self._edge.fleet.collect(spec.id).state,
            )
        finally:
            self._edge.fleet.release(spec.id)


# --------------------------------------------------------------------------------------------------
# Memory of a device


def _peaks(
    config: Config, options: Mapping[str, Any], state: State, cuts: Sequence[int]
) -> dict[int, float]:
    """Return the rise of the resident size in MB, by cut; 0 is unsplit, nothing if unknown."""
    if not _PEAK.exists():
        return {}
    peaks = {0: _in_process(config, str(options["local"]), _content(state, {}))}
    with _edge(f"{config.link.between_processes}://127.0.0.1:0") as edge:
        split = _Split(config, options, state, edge)
        for cut in cuts:
            with split.session(cut) as (content, _):
                peaks[cut] = _in_process(config, str(options["offload"]), content)
    return peaks


def _in_process(config: Config, client: str, content: RecordDict) -> float:
    """Train in a device process of its own; return by how many MB it grew."""
    folder = Path(str(config.run.dir))
    save_file(records.from_record(content.array_records[ARRAYS]), folder / "part.safetensors")
    told = {
        "config": config.text,
        "client": client,
        "part": str(folder / "part.safetensors"),
        "records": {name: dict(record) for name, record in content.config_records.items()},
    }
    command = [sys.executable, "-m", "fedsys.commands.bench.split"]
    done = subprocess.run(
        command, input=json.dumps(told), capture_output=True, text=True, check=False
    )
    (folder / "part.safetensors").unlink()
    if done.returncode:
        raise RuntimeFailure(f"a device process failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout) / 1e6


def _device() -> None:
    """Train as the parent says on standard input; print the rise of the resident size in bytes."""
    told = json.load(sys.stdin)
    config = configuration.parse(told["config"])
    training.set_threads(config.client.threads)
    made = locate(told["client"], "bench")
    federation.federation(config)

    def work() -> None:
        more = {name: ConfigRecord(values) for name, values in told["records"].items()}
        content = _content(load_file(told["part"]), {n: r for n, r in more.items() if n != CONFIG})
        if ASSIGNMENT in more:
            made(config, 0, content, dial).train()
        else:
            made(config, 0).train(content)

    print(peak_rise(work))


def peak_rise(work: Callable[[], object]) -> int:
    """Return by how many bytes the resident size of this process rises while it works."""
    _computed_once()
    gc.collect()
    before = _status("VmRSS")
    _PEAK.write_text("5")  # the peak is that of now on
    work()
    return _status("VmHWM") - before


def _computed_once() -> None:
    """Have torch load what it loads with the first backward, which is no part of a model."""
    layer = torch.nn.Conv2d(3, 4, 3)
    layer(torch.zeros(2, 3, 8, 8)).sum().backward()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the ratio to the unsplit round by cut."""
    rows = figures["cuts"]
    return Chart(
        f"Split over the memory link: at most {figures['worst_ratio']:.3f} of unsplit",
        "units on the device",
        "seconds of a round, unsplit = 1",
        [f"{row['cut']} ({row['after']})" for row in rows],
        {"split": [row["ratio"] for row in rows]},
    )


if __name__ == "__main__":
    _device()
