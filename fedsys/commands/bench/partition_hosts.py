"""Chains of real host processes for the benchmarks of partitioned inference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, fx

from fedsys.commands.host import start_host
from fedsys.config import CONF, compose_text, parse
from fedsys.models import build, layered
from fedsys.models.catalog import torchvision_names
from fedsys.models.layers import LayeredModel
from fedsys.partition.pipeline import Passed
from fedsys.partition.problem import RAW, Partition
from fedsys.partition.remote_host import RemoteHost
from fedsys.serving.chain import Chain, ChainModule, ChainOptions
from fedsys.serving.chain_parts import UnitParts
from fedsys.serving.engine import Card
from fedsys.serving.routes import Route
from fedsys.transport.network import Network
from fedsys.transport.security import new_token

CLASSES = 1000

LARGE_SIDE = 64
"""Height and width from which on images are not small."""


@dataclass(frozen=True, eq=False)
class BenchModel:
    """A model to be divided.

    Attributes:
        name: Of it.
        shape: Of an image.
        layers: As a chain of units, with values, in evaluation.
    """

    name: str
    shape: tuple[int, int, int]
    layers: LayeredModel

    @property
    def whole(self) -> fx.GraphModule:
        """The model."""
        return self.layers.graph

    @property
    def card(self) -> Card:
        """What the endpoint says of it."""
        names = tuple(f"class {i}" for i in range(CLASSES))
        return Card(names, self.shape, (0.5,) * 3, (0.25,) * 3, "pytorch")

    def image(self, rows: int = 1, seed: int = 0) -> Tensor:
        """Return a batch of images."""
        return torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(seed))


def model_of(name: str, side: int, seed: int = 0) -> BenchModel:
    """Return a model by its name in ``conf/model/``, or else in torchvision.

    Those of ``conf/model/`` are for small images: ResNet-50 without the stride of its beginning
    takes sixteen times as long as it is known to. So images of `LARGE_SIDE` or more go through
    torchvision's, where it has that name.

    Args:
        name: Of the model; random weights.
        side: Height and width of images.
        seed: Of the weights.
    """
    large = side >= LARGE_SIDE and name in torchvision_names()
    own = not large and (CONF / "model" / f"{name}.yaml").exists()
    given = f"model={name}" if own else f"model=torchvision model.name={name}"
    spec = parse(compose_text(given)).model
    shape = (3, side, side)
    net = build(spec, input_shape=shape, num_classes=CLASSES, seed=seed).eval()
    return BenchModel(name, shape, layered(net, shape))


@dataclass(frozen=True, eq=False)
class HostProcesses:
    """Host processes and the controller's ends of them.

    Attributes:
        remotes: In the order of their names.
        pids: Of the processes.
        token: That they want to hear.
    """

    remotes: list[RemoteHost]
    pids: list[int]
    token: str = field(repr=False)

    def chain(
        self, model: BenchModel, networks: Sequence[Network | None] = (), origin_s: float = 0.0
    ) -> Chain:
        """Return a chain over all hosts; ``networks`` lie before each of them."""
        parts = UnitParts(model.layers, model.shape)
        options = ChainOptions(networks=tuple(networks), origin_s=origin_s)
        return Chain(self.remotes, parts, token=self.token, options=options)

    def memory_bytes(self) -> int:
        """Return the memory of all hosts, and of those that they started: what is theirs alone."""
        total = 0
        for pid in self.pids:
            with suppress(psutil.Error):
                one = psutil.Process(pid)
                for process in (one, *one.children(recursive=True)):
                    with suppress(psutil.Error):
                        total += process.memory_full_info().uss
        return total


@contextmanager
def host_processes(
    names: Sequence[str], threads: int = 1, cores: Sequence[Sequence[int]] = ()
) -> Iterator[HostProcesses]:
    """Start ``fedsys host`` for each name on loopback; end them with the block.

    Args:
        names: Of the hosts.
        threads: Intra-op threads of each.
        cores: Processors of each; empty: all.

    Raises:
        RuntimeFailure: A process does not start.
    """
    token = new_token()

    def begin(name: str) -> Any:
        given = [f"host.name={name}", "host.address=tcp://127.0.0.1:0", f"host.threads={threads}"]
        return start_host(given, token)

    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        started = list(pool.map(begin, names))
        for _, spawned in started:
            stack.callback(spawned.end)
        for (pid, _), own in zip(started, cores, strict=False):
            keep_to(pid, own)
        remotes = [
            RemoteHost(f"hosts.list[{index}]", name, spawned.address, token=token)
            for index, (name, (_, spawned)) in enumerate(zip(names, started, strict=True))
        ]
        for remote in remotes:
            stack.callback(remote.close)
        yield HostProcesses(remotes, [pid for pid, _ in started], token)


def keep_to(pid: int, cores: Sequence[int]) -> None:
    """Have all threads of a process computed by some processors only (Linux)."""
    tasks = Path(f"/proc/{pid}/task")
    if cores and hasattr(os, "sched_setaffinity") and tasks.exists():
        for task in tasks.iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


def cut_at(*cuts: int) -> Partition:
    """Return a partition whose tensors are written as they are."""
    return Partition(tuple(cuts), (RAW,) * len(cuts))


@dataclass(eq=False)
class Laid:
    """A pipeline, and what its last request told.

    Attributes:
        module: Computes requests.
        passed: Of the last one.
        took_s: Seconds of the last one.
    """

    module: ChainModule
    passed: Passed | None = None
    took_s: float = 0.0

    def told(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what each host told of the last request, by name."""
        return {str(part["host"]): part for part in (self.passed.parts if self.passed else ())}


def lay(chain: Chain, partition: Partition) -> Laid:
    """Build a pipeline whose requests are noted."""
    noted: list[Laid] = []

    def note(route: Route, passed: Passed, rows: int, took_s: float) -> None:
        noted[0].passed, noted[0].took_s = passed, took_s

    noted.append(Laid(chain.lay(Route(partition), note)))
    return noted[0]
