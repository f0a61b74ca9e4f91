"""Which layers keep more channels than they need, because the engine that answers is faster then.

ONNX Runtime computes blocks of 8 or 16 channels, and what is no multiple of them goes another way:
a shrunk MobileNetV2 is 2.7 times as fast with all numbers of channels rounded up to a multiple of
8. In PyTorch a DenseNet-121 takes 6 to 20 % longer with all of them rounded
(``benchmarks/prune.md``, one and 32 images, one thread, AVX-512). So it is measured:
whole models, because what one layer saves depends on the layout that its neighbours leave, on the
engine and with the batch sizes that are served. Channels that are added compute zero, so that every
choice is the same function.

`search` is a pure function of groups of channels and of a function that times choices: first
nothing and everything is rounded; then, from the fastest of these, one kind of layers after the
other, and ever shorter stretches of one kind, get each other width, and keep it if that is faster:
more channels by a margin, fewer by anything. What does not pay stays as narrow as it was. `decided`
gives it models to time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedsys.config import VariantsConfig
from fedsys.config.targets import import_extra
from fedsys.pruning.dense.channels import Coupling
from fedsys.pruning.dense.fold import answering
from fedsys.pruning.dense.removal import Removal, probes
from fedsys.pruning.export import TOLERANCE, onnx_bytes
from fedsys.pruning.measuring import in_turns, quantile, with_threads
from fedsys.pruning.precision import OnnxModule

AUTO = "auto"
"""The value of ``variants.round_to`` that measures."""

MULTIPLES = (8, 16)
"""What numbers of channels are rounded up to: blocks of AVX2, and of AVX-512, in float32."""

TRIES = 16
"""Choices that are compared with the best one so far, at most."""

TORCH, ONNX = "torch", "onnx"

_PAIR = 2  # the best choice and another one

_SHORTEST = 1 / 16
"""Share of all groups below which a stretch is not divided further: nobody could measure it."""

_TRY_S = 0.3
"""Seconds that one comparison takes for each batch size, but for warming up."""

_RUNS = (5, 30)
_FAST = 0.25
"""Share of the runs that are faster than what counts: what else a machine does only adds time."""

Choice = tuple[int, ...]
"""For each group the multiple that its channels are rounded up to; 1 for none."""

Times = Callable[[Sequence[Choice]], Sequence[float]]
"""Times choices in turns, in milliseconds."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers with equal channels.

    Attributes:
        layers: Their names.
        kind: What they are; groups of one kind are tried together.
        channels: Number that is needed.
        most: Number in the unpruned model.
    """

    layers: tuple[str, ...]
    kind: str
    channels: int
    most: int

    def width(self, multiple: int) -> int:
        """Return the number of channels rounded up, as far as there are so many."""
        return min(math.ceil(self.channels / multiple) * multiple, self.most)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is rounded, and why.

    Attributes:
        groups: All groups of channels.
        choice: What each is rounded up to.
        engine: What the models were timed on.
        predicted_ms: What `choice` took when it was found. (The product of all gains on the way was
            too small by a third for a DenseNet-121: of many comparisons the lucky ones are kept.)
        measured_ms: What was measured at the end, in turns, by name: ``exact``, ``round8``,
            ``round16`` and ``chosen``; empty where there was nothing to round.
        tries: Comparisons.
    """

    groups: tuple[Group, ...]
    choice: Choice
    engine: str = TORCH
    predicted_ms: float = math.nan
    measured_ms: Mapping[str, float] | None = None
    tries: int = 0

    @property
    def round_to(self) -> dict[str, int]:
        """Multiples by the name of the layer, for `fedsys.pruning.dense.shrink.shrink`."""
        return {
            layer: multiple
            for group, multiple in zip(self.groups, self.choice, strict=True)
            for layer in group.layers
            if multiple > 1
        }

    @property
    def rounded(self) -> list[tuple[Group, int]]:
        """The groups that get more channels, and how many they have then."""
        pairs = zip(self.groups, self.choice, strict=True)
        return [(group, group.width(multiple)) for group, multiple in pairs if multiple > 1]

    def figures(self) -> dict[str, Any]:
        """Return all of it as numbers and texts by name, for JSON."""
        return {
            "engine": self.engine,
            "groups": len(self.groups),
            "rounded": [
                {"layers": list(group.layers), "channels": group.channels, "rounded": width}
                for group, width in self.rounded
            ],
            "predicted_ms": None if math.isnan(self.predicted_ms) else self.predicted_ms,
            "measured_ms": dict(self.measured_ms or {}),
            "tries": self.tries,
        }

    def __str__(self) -> str:
        if not self.measured_ms:
            return "no number of channels can be rounded up"
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in self.measured_ms.items())
        head = (
            f"{len(self.rounded)} of {len(self.groups)} groups of channels rounded up for "
            f"{self.engine}; ms: {times} (predicted {self.predicted_ms:.3g}, {self.tries} tries)"
        )
        lines = [f"      {g.layers[0]}: {g.channels} -> {width}" for g, width in self.rounded]
        return "\n".join([head, *lines])


# --------------------------------------------------------------------------------------------------
# The decision


def search(
    groups: Sequence[Group],
    times: Times,
    *,
    margin: float = 0.02,
    multiples: Sequence[int] = MULTIPLES,
    tries: int = TRIES,
    engine: str = TORCH,
) -> Rounding:
    """Find which groups are rounded up, and to what.

    Args:
        groups: In the order in which they are computed.
        times: Says what choices take, in milliseconds.
        margin: Share by which a choice of more channels must be faster to be taken.
        multiples: What numbers may be rounded up to.
        tries: Comparisons with the best choice so far, at most.
        engine: For the record.

    Returns:
        A choice that was faster than rounding nothing by the margin, in the last measurement too,
        or the one that rounds nothing.
    """
    groups = tuple(groups)
    exact = tuple(1 for _ in groups)
    named = _uniform(groups, multiples)
    if all(choice == exact for choice in named.values()):
        return Rounding(groups, exact, engine)
    best, predicted = _fastest(named, times, margin)
    seen, count = {best, *named.values()}, 0
    stretches = _kinds(groups)
    for stretch in stretches:  # it grows meanwhile
        for multiple in (1, *multiples):
            changed = [multiple if i in stretch else best[i] for i in range(len(groups))]
            other = _narrowest(groups, changed, multiples)
            if other in seen or count == tries:
                continue
            seen.add(other)
            count += 1
            before, after = times([best, other])
            most = before if _size(groups, other) < _size(groups, best) else before * (1.0 - margin)
            if after < most:
                best, predicted = other, after
        if len(stretch) > max(1.0, _SHORTEST * len(groups)):
            middle = len(stretch) // 2
            stretches += [stretch[:middle], stretch[middle:]]
    named["chosen"] = best
    measured = dict(zip(named, times(list(named.values())), strict=True))
    choice = _best_of(named, measured, margin, first="chosen")
    chosen = choice if measured[choice] < measured["exact"] * (1.0 - margin) else "exact"
    if chosen != "chosen":
        predicted, measured["chosen"] = measured[chosen], measured[chosen]
    return Rounding(groups, named[chosen], engine, predicted, measured, count)


def _uniform(groups: Sequence[Group], multiples: Sequence[int]) -> dict[str, Choice]:
    """Return by name the choices that treat all groups alike: none rounded, and each multiple."""
    names = {"exact": 1, **{f"round{m}": m for m in multiples}}
    return {name: _narrowest(groups, [m] * len(groups), multiples) for name, m in names.items()}


def _narrowest(groups: Sequence[Group], choice: Sequence[int], multiples: Sequence[int]) -> Choice:
    """Return the choice of the same widths by the smallest multiples: one meaning, one value."""
    return tuple(
        next(m for m in sorted({1, *multiples, wanted}) if group.width(m) == group.width(wanted))
        for group, wanted in zip(groups, choice, strict=True)
    )


def _fastest(named: Mapping[str, Choice], times: Times, margin: float) -> tuple[Choice, float]:
    took = dict(zip(named, times(list(named.values())), strict=True))
    name = _best_of(named, took, margin, first="exact")
    return named[name], took[name]


def _best_of(names: Iterable[str], took: Mapping[str, float], margin: float, *, first: str) -> str:
    """Return the name of the least time; `first` unless another one is faster by the margin."""
    best = min(names, key=lambda name: took[name])
    return best if took[best] < took[first] * (1.0 - margin) else first


def _size(groups: Sequence[Group], choice: Choice) -> int:
    return sum(group.width(multiple) for group, multiple in zip(groups, choice, strict=True))


def _kinds(groups: Sequence[Group]) -> list[list[int]]:
    """Return the indices of the groups of each kind."""
    found: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group.kind, []).append(index)
    return list(found.values())


# --------------------------------------------------------------------------------------------------
# What is measured


def groups_of(plan: Removal) -> tuple[Group, ...]:
    """Return the groups of channels of a plan that could be wider.

    Outputs of the model are not, nor what is computed in groups other than channel by channel.
    """
    ops = {op.name: op for op in plan.reading.ops.values() if op.module is not None}
    found = []
    for edits in plan.groups:
        layers = [edit for edit in edits if edit.after and ops[edit.name].groups == 1]
        most = min((edit.before for edit in layers), default=0)
        if not layers or layers[0].after >= most:
            continue
        kinds = sorted({_kind(ops[edit.name].layer) for edit in edits if edit.after})
        names = tuple(edit.name for edit in layers)
        found.append(Group(names, " + ".join(kinds), layers[0].after, most))
    return tuple(found)


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return type(layer).__name__
    size = "x".join(map(str, layer.kernel_size))
    return f"{size} {'in groups' if layer.groups > 1 else type(layer).__name__}"


def decided(
    plan: Removal,
    options: VariantsConfig,
    input_shape: Sequence[int],
    *,
    engines: Sequence[str] | None = None,
) -> Rounding:
    """Measure which groups of a plan are rounded up, on the engine that answers.

    Args:
        plan: Without rounding.
        options: ``coupling``, ``fold_batchnorm``, ``batch_sizes``, the first of ``threads`` and
            ``margin``; with ``onnx`` ONNX Runtime answers where it is the faster one.
        input_shape: Of one input without the batch.
        engines: What may answer, of `TORCH` and `ONNX`; None: what `options` say.

    Raises:
        ModelError: The extra ``export`` is not installed, or the model cannot be written as ONNX.
    """
    groups = groups_of(plan)
    if engines is None:
        engines = (TORCH, ONNX) if options.onnx else (TORCH,)
    timed = {engine: _Timed(plan, groups, options, input_shape, engine) for engine in engines}
    engine = engines[0]
    if len(engines) > 1 and groups:  # the one that is faster at its best
        some = [*_uniform(groups, MULTIPLES).values()]
        engine = min(engines, key=lambda name: min(timed[name](some)))
    return search(groups, timed[engine], margin=options.margin, engine=engine)


class _Timed:
    """Times choices on one engine: the geometric mean over the batch sizes, in milliseconds.

    With one thread these are milliseconds of the processor: a busy machine made a VGG-16 look twice
    as slow with rounded channels as with exact ones, of five runs each by the clock on the wall.
    """

    def __init__(
        self,
        plan: Removal,
        groups: Sequence[Group],
        options: VariantsConfig,
        input_shape: Sequence[int],
        engine: str,
    ) -> None:
        self._plan, self._groups, self._options = plan, groups, options
        self._shape, self._onnx = tuple(input_shape), engine == ONNX
        self._modules: dict[Choice, nn.Module] = {}
        self._named: frozenset[Choice] = frozenset()
        self._took: dict[int, float] = {}
        self._template: _Template | None = None

    def __call__(self, choices: Sequence[Choice]) -> list[float]:
        models = {str(i): self._module(choice) for i, choice in enumerate(choices)}
        clock = time.thread_time if self._options.threads[0] == 1 else time.perf_counter
        logs = [0.0] * len(choices)
        with with_threads(self._options.threads[0]):
            for batch in self._options.batch_sizes:
                draws = torch.Generator().manual_seed(0)
                images = torch.randn(batch, *self._shape, generator=draws)
                if batch not in self._took:
                    alone = in_turns({"": models["0"]}, images, 1, clock=clock)
                    self._took[batch] = min(alone[""])
                fitting = int(_TRY_S / (len(models) * self._took[batch]))
                runs = max(_RUNS[0], min(_RUNS[1], fitting))
                every = in_turns(models, images, runs, warm_up=1, clock=clock)
                for i, took in enumerate(every.values()):
                    logs[i] += math.log(1000.0 * quantile(took, _FAST))
        self._forget(choices)
        return [math.exp(log / len(self._options.batch_sizes)) for log in logs]

    def _forget(self, choices: Sequence[Choice]) -> None:
        """Keep the models of these choices, and of those that are timed first and at the end."""
        if len(choices) > _PAIR:
            self._named = frozenset(choices)
        kept = self._named.union(choices)
        self._modules = {c: module for c, module in self._modules.items() if c in kept}

    def _module(self, choice: Choice) -> nn.Module:
        if choice not in self._modules:
            self._modules[choice] = self._made(choice)
        return self._modules[choice]

    def _made(self, choice: Choice) -> nn.Module:
        options = self._options
        round_to = Rounding(tuple(self._groups), choice).round_to
        plan = self._plan.rounded(Coupling(options.coupling), round_to) if round_to else self._plan
        model = answering(plan.apply().float(), self._shape, fold=options.fold_batchnorm)
        if not self._onnx:
            return model
        if self._template is None:
            self._template = _Template(model, self._shape)
        return self._template.filled(model)


class _Template:
    """An ONNX file that other widths of the same graph are put into.

    To export a model takes ten seconds, to replace its weights some milliseconds.
    """

    def __init__(self, model: fx.GraphModule, input_shape: Sequence[int]) -> None:
        self._shape, self._library = tuple(input_shape), import_extra("onnx")
        self._content = onnx_bytes(model, self._shape)

    def filled(self, model: fx.GraphModule) -> nn.Module:
        """Return a model as ONNX Runtime computes it; exported anew where that is not the same."""
        file = self._library.load_from_string(self._content)
        del file.graph.value_info[:]  # shapes of tensors between the layers
        tensors = {tensor.name: tensor for tensor in file.graph.initializer}
        rows = {name: tensor.dims[0] for name, tensor in tensors.items() if tensor.dims}
        for name, value in model.state_dict().items():
            if name in tensors and list(value.shape) != list(tensors[name].dims):
                array = value.detach().numpy()
                tensors[name].CopyFrom(self._library.numpy_helper.from_array(array, name))
        for node in file.graph.node:
            attributes = {attribute.name: attribute for attribute in node.attribute}
            if node.op_type == "Conv" and attributes["group"].i > 1:  # as many more as channels
                weight = node.input[1]
                groups = attributes["group"].i * tensors[weight].dims[0] // rows[weight]
                attributes["group"].i = groups
            elif node.op_type == "Reshape" and node.input[1] in tensors:
                self._keep_rows(tensors[node.input[1]], attributes)
        try:
            module = OnnxModule(file.SerializeToString())
            if _agree(model, module, probes(self._shape)):
                return module
        except Exception:  # ONNX Runtime has a class of its own for every status
            pass
        return OnnxModule(onnx_bytes(model, self._shape))

    def _keep_rows(self, shape: Any, attributes: Mapping[str, Any]) -> None:
        """Let a reshape to ``(batch, channels)`` take as many channels as there are."""
        arrays = self._library.numpy_helper
        if len(sizes := arrays.to_array(shape)) == 2 and sizes[0] == -1:
            shape.CopyFrom(arrays.from_array(sizes * 0 - [0, 1], shape.name))
            if "allowzero" in attributes:
                attributes["allowzero"].i = 0


def _agree(model: nn.Module, other: nn.Module, inputs: Tensor) -> bool:
    with torch.inference_mode():
        expected, got = model(inputs), other(inputs)
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    return expected.shape == got.shape and float((expected - got).abs().max()) <= allowed
