"""How long units take on a device that never computed them, from units that it did.

CONTINUER (Abdul Majeed et al., IEEE EDGE 2022) estimates the latency of a path from its layers, by
one regression for each type of layer, as Neurosurgeon does (Kang et al., ASPLOS 2017); the paper
reports a mean error of 13.06 % at most. Here a *unit* of the chain is what is measured and
estimated, with the shapes of all layers in it as features: layers that are measured one by one add
up to more than the unit, in which what one leaves in the cache the next one finds. The type of a
unit is the layer that does most of its work. What was measured wins over what is estimated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, fx, nn

from fedsys.errors import RunError
from fedsys.files import json_text, write_atomic
from fedsys.models.layers import LayeredModel, stages
from fedsys.models.measure import NodeCost, measure
from fedsys.planning.costs import MachineCosts, Messaging
from fedsys.serving.recovery.regression import Estimator, HeldOut

FORMAT = 1
WORK = ("conv", "pointwise", "depthwise", "linear")
LIGHT = ("norm", "activation", "pool", "other")
FEATURES = ("macs", *(f"{k}_macs" for k in WORK), *(f"{k}_out" for k in (*WORK, *LIGHT)),
            "nodes", "weights", "elements_in")  # fmt: skip
"""Of a unit and a batch: multiply-accumulates in all and by layer, elements that layers make, their
number, elements of weights, and of what goes in."""

_FREE = Messaging()
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)


@dataclass(frozen=True)
class UnitSample:
    """One measurement.

    Attributes:
        device: Where.
        kind: Type of the unit: one of `WORK`, or ``light``.
        features: As named by `FEATURES`.
        seconds: Of one forward pass of the unit.
    """

    device: str
    kind: str
    features: tuple[float, ...]
    seconds: float


def unit_features(
    layers: LayeredModel, input_shape: Sequence[int], rows: int = 1
) -> list[tuple[str, tuple[float, ...]]]:
    """Return the type and the features of each unit, for a batch.

    Args:
        layers: The model, or a path through it.
        input_shape: Of its input, without the batch.
        rows: Examples of the batch.
    """
    dtype = next((p.dtype for p in layers.graph.parameters()), torch.float32)
    made = measure(layers.graph, torch.empty((3, *input_shape), dtype=dtype, device="meta"))
    nodes = {node.name: node for node in layers.graph.graph.nodes}
    found, before = [], math.prod(input_shape)
    for unit in layers.units:
        sums = dict.fromkeys(FEATURES, 0.0)
        for name in unit.nodes:
            _count(sums, layers.graph, nodes[name], made[name], rows / 3)
        sums["macs"] = float(unit.macs * rows)
        sums["weights"], sums["elements_in"] = float(unit.params), float(before * rows)
        work = [sums[f"{kind}_macs"] for kind in WORK]
        kind = WORK[int(np.argmax(work))] if any(work) else "light"
        found.append((kind, tuple(sums[key] for key in FEATURES)))
        before = math.prod(unit.out_shape)
    return found


def _count(
    sums: dict[str, float], graph: fx.GraphModule, node: fx.Node, cost: NodeCost, scale: float
) -> None:
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = _kind(module, cost)
    if kind in WORK:
        sums[f"{kind}_macs"] += cost.macs * scale
    sums[f"{kind}_out"] += math.prod(cost.shape or (0,)) * scale
    sums["nodes"] += 1.0


def _kind(module: nn.Module | None, cost: NodeCost) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            return "depthwise"
        return "pointwise" if math.prod(module.kernel_size) == 1 else "conv"
    for kind, of in (("norm", _NORMS), ("activation", _ACTIVATIONS), ("pool", _POOLS)):
        if isinstance(module, of):
            return kind
    return "linear" if cost.macs else "other"


@contextmanager
def intra_op_threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads, and then as before; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def unit_samples(
    layers: LayeredModel,
    example: Tensor,
    *,
    device: str = "here",
    repeats: int = 15,
    seconds: float = math.inf,
) -> list[UnitSample]:
    """Measure each unit on this machine: the median of several passes through all of them.

    Units are timed in their order, as in a request, not one many times over.

    Args:
        layers: The model, with values; computes in evaluation.
        example: A batch of inputs.
        device: How the measurements are called.
        repeats: Passes that count; two come before.
        seconds: After which no further pass begins, once one has counted.
    """
    parts = [part.eval() for part in stages(layers, range(1, len(layers)))]
    took: list[list[float]] = [[] for _ in parts]
    until = time.monotonic() + seconds
    for turn in range(2 + repeats):
        if turn > 2 and time.monotonic() > until:
            break
        x = example
        for part, times in zip(parts, took, strict=True):
            began = time.perf_counter()
            x = part(x)
            if turn >= 2:
                times.append(time.perf_counter() - began)
    described = unit_features(layers, tuple(example.shape[1:]), len(example))
    return [
        UnitSample(device, kind, features, median(times))
        for (kind, features), times in zip(described, took, strict=True)
    ]


@final
class LatencyEstimator:
    """Estimates what units take, from samples.

    Args:
        samples: What was measured, on any devices.

    Attributes:
        errors: By device, on held-out units.
    """

    def __init__(self, samples: Sequence[UnitSample]) -> None:
        self.samples = tuple(samples)
        self._known: dict[tuple[str, tuple[float, ...]], list[float]] = {}
        self._fitted: dict[str, Estimator] = {}
        self.errors: dict[str, HeldOut] = {}
        for sample in self.samples:
            key = sample.device, sample.features
            self._known.setdefault(key, []).append(sample.seconds)
        for device in sorted({sample.device for sample in self.samples}):
            of_it = [sample for sample in self.samples if sample.device == device]
            self._fitted[device] = estimator = Estimator(
                tuple(sample.kind for sample in of_it),
                np.array([sample.features for sample in of_it]),
                np.array([sample.seconds for sample in of_it]),
            )
            self.errors[device] = estimator.errors

    def seconds(
        self, device: str, layers: LayeredModel, input_shape: Sequence[int], rows: int = 1
    ) -> list[tuple[float, bool]]:
        """Return for each unit what it takes, and whether that was measured.

        Args:
            device: Of the samples.
            layers: The model, or a path through it.
            input_shape: Of its input, without the batch.
            rows: Examples of a batch.

        Raises:
            RunError: Nothing was measured on the device.
        """
        if device not in self._fitted:
            known = ", ".join(self._fitted) or "none"
            raise RunError(f"nothing was measured on {device}; there are samples of {known}")
        found = []
        for kind, features in unit_features(layers, input_shape, rows):
            if (known_s := self._known.get((device, features))) is not None:
                found.append((median(known_s), True))
            else:
                found.append((self._fitted[device](kind, np.array(features)), False))
        return found

    def costs(
        self, device: str, layers: LayeredModel, input_shape: Sequence[int], rows: int = 1,
        messaging: Messaging = _FREE,
    ) -> MachineCosts:  # fmt: skip
        """Return the device as a machine of `fedsys.planning`, that adds links along a path.

        Arguments and errors as for `seconds`. It answers and does not train: backward is free.
        """
        forward = tuple(seconds for seconds, _ in self.seconds(device, layers, input_shape, rows))
        nothing = (0.0,) * len(forward)
        return MachineCosts(device, (rows,), (forward,), (nothing,), nothing, messaging=messaging)

    def save(self, path: Path) -> None:
        """Write the samples, and the errors of what is made of them, as JSON.

        Raises:
            RunError: The file cannot be written.
        """
        body = {
            "format": FORMAT,
            "features": FEATURES,
            "samples": [asdict(sample) for sample in self.samples],
            "held_out": {device: asdict(errors) for device, errors in self.errors.items()},
        }
        write_atomic(path, json_text(body).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> LatencyEstimator:
        """Read what `save` wrote.

        Raises:
            RunError: It is missing, damaged, or of other features.
        """
        try:
            body: Mapping[str, Any] = json.loads(path.read_bytes())
            if body["format"] != FORMAT or tuple(body["features"]) != FEATURES:
                raise ValueError("its features are others")
            return cls([_sample(each) for each in body["samples"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: no latencies can be read: {error}; measure again") from error


def _sample(each: Mapping[str, Any]) -> UnitSample:
    features = tuple(float(value) for value in each["features"])
    seconds = float(each["seconds"])
    if len(features) != len(FEATURES) or not 0.0 < seconds < math.inf:
        raise ValueError("a sample is not usable")
    return UnitSample(str(each["device"]), str(each["kind"]), features, seconds)
