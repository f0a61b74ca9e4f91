"""Which models of torchvision and timm go through all of it: traced, cut, split, pruned, served.

Every model is built for ten classes with random weights, biases and statistics of both signs, and
taken as a user would give it, without a change. Each column is a check of the product that must
hold to count, not that something ran; what raises an error is a reason in its column.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedsys import models
from fedsys.commands.bench import Chart
from fedsys.commands.bench.prune_models import as_trained
from fedsys.config import Config
from fedsys.errors import ConfigError, FedsysError, ModelError
from fedsys.models.catalog import torchvision_names
from fedsys.pruning.candidates import Candidate, parent_candidate
from fedsys.pruning.dense.architecture import load, save
from fedsys.pruning.dense.fold import as_near
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.export import export_onnx
from fedsys.pruning.measuring import latencies, machine
from fedsys.pruning.portfolio import About, Portfolio
from fedsys.randomness import Address, drawing, seeded_default_generator
from fedsys.serving.portfolio import PortfolioEngine
from fedsys.training import plain as training
from fedsys.training.masks import prunable
from fedsys.training.part import keep_gradient

CLASSES = 10
COLUMNS = ("traced", "cut", "split_exact", "shrunk_exact", "saved", "served", "onnx")
NO_CUT = "there is no place to cut"
TIMM = "timm/"
"""Stands before the names of timm's models."""

_FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
_NAMED: Mapping[str, Callable[[], list[str]]] = {
    "families": lambda: list(_FAMILIES),
    "torchvision": torchvision_names,
}


@dataclass(slots=True)
class _Case:
    """One model and what became of it, by column."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    config: Config
    found: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    dense: fx.GraphModule | None = None

    @property
    def images(self) -> Tensor:
        return torch.randn((2, *self.shape), generator=Address(self.config.seed).torch("coverage"))


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Take every model through every column.

    Args:
        config: The seed and the groups ``variants`` and ``serving``.
        options: ``models``: names of torchvision's classifiers, names of timm's behind ``timm/``,
            ``families`` (one of each family of torchvision) or ``torchvision`` (all of its);
            ``sizes`` of images, the first that a model takes counts; ``most_parameters`` of a
            model that is taken; ``columns`` to fill.

    Returns:
        ``models``: a row for each, with true or false by column; ``shares`` of those taken by
        column; ``reasons`` by model and column.

    Raises:
        ConfigError: A column is unknown, or timm is asked for and not installed.
    """
    training.set_threads(config.client.threads)
    columns, names = list(options["columns"]), list(_names(options["models"]))
    for column in columns:
        if column not in COLUMNS:
            rule = f"must be some of {', '.join(COLUMNS)}"
            raise ConfigError.of("bench.columns", column, rule)
    rows: list[dict[str, Any]] = []
    reasons: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        row, why = _row(name, config, options, columns)
        rows.append(row)
        reasons += [{"model": name, "column": c, "reason": reason} for c, reason in why.items()]
        marks = " ".join(c if row.get(c) else f"NOT:{c}" for c in columns)
        marks = "left out" if row["left_out"] else marks
        print(f"{number}/{len(names)} {name}: {marks}", file=sys.stderr, flush=True)
    return {"machine": machine(), "models": rows, "shares": _shares(rows, columns),
            "reasons": reasons}  # fmt: skip


def _names(given: Sequence[str]) -> Iterator[str]:
    for name in given:
        if name.startswith(TIMM) and importlib.util.find_spec("timm") is None:
            rule = "needs the package timm, which fedsys does not depend on"
            way_out = "install it into an environment of its own: pip install timm"
            raise ConfigError.of("bench.models", name, rule, way_out)
        yield from _NAMED[name]() if name in _NAMED else (name,)


def _shares(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for package in ("torchvision", "timm", "all"):
        mine = [r for r in rows if not r["left_out"] and package in (r["package"], "all")]
        if mine:
            shares = {c: sum(bool(r[c]) for r in mine) / len(mine) for c in columns}
            found.append({"package": package, "models": len(mine), **shares})
    return found


def _row(
    name: str, config: Config, options: Mapping[str, Any], columns: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    package = "timm" if name.startswith(TIMM) else "torchvision"
    row: dict[str, Any] = {"model": name, "package": package, "parameters": None, "size": None}
    row |= {"left_out": False, **dict.fromkeys(columns, False)}
    try:
        case = _built(name, config, list(options["sizes"]), int(options["most_parameters"]))
    except FedsysError as error:
        return row, {"built": str(error)}
    row["parameters"] = sum(p.numel() for p in case.model.parameters())
    if not case.shape[1]:
        return row | {"left_out": True}, {"built": "more parameters than bench.most_parameters"}
    for column in columns:
        _try(case, column)
    row |= {"size": case.shape[1], **case.found}
    return row, case.reasons


def _built(name: str, config: Config, sizes: Sequence[int], most: int) -> _Case:
    """Return the model at the first size of images that it takes; size 0 if it is too large."""
    reason: Exception = ConfigError.of("bench.sizes", list(sizes), "must not be empty")
    for size in sizes:
        shape = (3, int(size), int(size))
        try:
            given = models.build(_spec(name), input_shape=shape, num_classes=CLASSES,
                                 seed=config.seed)  # fmt: skip
            model = as_trained(without_zeros(given, config.seed), config.seed)
            if sum(p.numel() for p in model.parameters()) > most:
                return _Case(name, model, (3, 0, 0), config)
            case = _Case(name, model, shape, config)
            with torch.no_grad(), _drawing(case):
                copy.deepcopy(model).train()(case.images)
                model(case.images)
            return case
        except Exception as error:  # whatever a model says of images that are too small
            reason = error
    raise ModelError(f"takes images of none of the sizes {list(sizes)}: {reason}")


def without_zeros(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter but biases anew that is all zeros: ``0.02 N(0, 1)``.

    Some models are built with a last layer of zeros. Their outputs do not depend on the image, so
    that no column would say anything of them, and pruning refuses them.
    """
    draw = Address(seed).torch("coverage-zeros")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] != "bias" and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    return model


def _spec(name: str) -> dict[str, Any]:
    if name.startswith(TIMM):
        return {"_target_": "timm.create_model", "model_name": name.removeprefix(TIMM)}
    return {"_target_": "fedsys.models.torchvision_classifier", "name": name, "norm": "batch"}


def _try(case: _Case, column: str) -> None:
    start = time.perf_counter()
    try:
        case.found |= {column: True, **_CHECKS[column](case)}
    except Exception as error:  # of any model, in any of the steps: it is the reason
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        case.reasons[column] = text if isinstance(error, FedsysError) else f"{error!r:.200}"
    case.found[f"{column}_s"] = round(time.perf_counter() - start, 1)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ModelError(what)


# --------------------------------------------------------------------------------------------------
# The columns


def _traced(case: _Case) -> dict[str, Any]:
    graph = models.trace(case.model, case.shape)
    with torch.no_grad():
        same = torch.equal(graph.eval()(case.images), case.model(case.images))
    _check(same, "the graph gives other bits than the model")
    return {}


def _cut(case: _Case) -> dict[str, Any]:
    cuts = len(models.layered(case.model, case.shape).cuts)
    _check(cuts > 0, NO_CUT)
    return {"cuts": cuts}


def _split_exact(case: _Case) -> dict[str, Any]:
    """Compare gradients and statistics of one step, cut in the middle, with those of the whole."""
    layers = models.layered(case.model, case.shape)
    _check(len(layers.cuts) > 0, NO_CUT)
    cut = layers.cuts[len(layers.cuts) // 2]
    whole = copy.deepcopy(case.model).train()
    device, edge = (copy.deepcopy(half).train() for half in models.split(layers, cut))
    labels = torch.tensor([1, 7])
    with _drawing(case):
        _backward(F.cross_entropy(whole(case.images), labels))
    with _drawing(case):
        sent = device(case.images)
        arrived = sent.detach()
        gradient = keep_gradient(arrived)
        _backward(F.cross_entropy(edge(arrived), labels))
        torch.autograd.backward(sent, gradient)
    halves = (device, edge)
    grads = {n: p.grad for half in halves for n, p in half.named_parameters()}
    states = {n: t for half in halves for n, t in half.state_dict().items()}
    for name, parameter in whole.named_parameters():
        _check(_equal(parameter.grad, grads.get(name)), f"the gradient of {name} is another one")
    for name, tensor in whole.state_dict().items():
        _check(_equal(tensor, states.get(name)), f"{name} is another one after a step")
    return {"cut_at": cut}


def _backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


@contextmanager
def _drawing(case: _Case) -> Iterator[None]:
    """Let dropout of the product and of others draw the same in every such block."""
    address = Address(case.config.seed, round=1)
    with seeded_default_generator(case.config.seed), drawing(address, 0, 2):
        yield


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _shrunk_exact(case: _Case) -> dict[str, Any]:
    """Prune half of the outputs of every layer but the last; `shrink` compares outputs itself."""
    weights = list(prunable(case.model))[:-1]
    masks = {}
    for name in weights:
        mask = torch.ones_like(case.model.get_parameter(name))
        mask[::2] = 0
        masks[name] = mask
    small = shrink(case.model, case.shape, masks=masks)
    case.dense = small.model
    return {"parameters_left": small.report.parameters / small.report.parameters_before}


def _saved(case: _Case) -> dict[str, Any]:
    """Save and read the dense model, and the parent."""
    dense = _dense(case)
    with TemporaryDirectory(prefix="fedsys-coverage-") as folder:
        read = load(save(dense, folder))
        with torch.no_grad():
            same = torch.equal(read(case.images), dense(case.images))
    _check(same, "the model that was read gives other bits")
    _parent(case)
    return {}


def _served(case: _Case) -> dict[str, Any]:
    """Ask the engine behind the endpoint, on a portfolio of the parent."""
    parent = _parent(case)
    about = About(
        model=_spec(case.name), classes=tuple(map(str, range(CLASSES))), input_shape=case.shape,
        mean=(0.5,) * 3, std=(0.5,) * 3, machine=machine(), source="random weights",
    )  # fmt: skip
    name = parent.variant.name
    took = latencies({name: parent.module}, case.shape, runs=1)[name]
    variant = _with_latencies(parent, took)
    with TemporaryDirectory(prefix="fedsys-coverage-") as folder, torch.no_grad():
        portfolio = Portfolio.write(Path(folder) / "p", about, [(variant, parent.content)])
        engine = PortfolioEngine(portfolio, case.config.serving)
        try:
            answer = torch.from_numpy(engine.answer(case.images.numpy()).scores)
        finally:
            engine.close()
        expected = case.model(case.images)
        same = torch.allclose(answer, expected, rtol=1e-4, atol=1e-4)
        same = same or as_near(case.model, case.images, expected, answer)
    _check(same, "the endpoint answers otherwise than the model")
    return {}


def _onnx(case: _Case) -> dict[str, Any]:
    with TemporaryDirectory(prefix="fedsys-coverage-") as folder:
        export_onnx(_dense(case), case.shape, Path(folder) / "model.onnx")
    return {}


def _dense(case: _Case) -> fx.GraphModule:
    if case.dense is None:
        raise ModelError("there is no dense model")
    return case.dense


def _parent(case: _Case) -> Candidate:
    return parent_candidate(case.model, case.config.variants, case.shape)


def _with_latencies(candidate: Candidate, took: Any) -> Any:
    return dataclasses.replace(candidate.variant, latencies=took, accuracy=1.0)


_CHECKS: Mapping[str, Callable[[_Case], dict[str, Any]]] = {
    "traced": _traced,
    "cut": _cut,
    "split_exact": _split_exact,
    "shrunk_exact": _shrunk_exact,
    "saved": _saved,
    "served": _served,
    "onnx": _onnx,
}


def chart(figures: Mapping[str, Any]) -> Chart:
    """Show the shares by column."""
    shares = figures["shares"]
    columns = [c for c in COLUMNS if shares and c in shares[0]]
    return Chart(
        title="Models of torchvision and timm that pass",
        x_label="check",
        y_label="share of the models",
        labels=columns,
        series={row["package"]: [row[c] for c in columns] for row in shares},
    )
