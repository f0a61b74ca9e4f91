"""From one model to a portfolio: masks, optional training under them, conversion, measuring.

Every *level* is a masked model; `convert` makes a *candidate* of it, and lower precisions of a
candidate are candidates too. `measured` gives all of them their figures, `fedsys.pruning.measuring`
decides by these, on the validation part, which ones stay. Only then is the test part scored, once.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys import data, optimizers, training
from fedsys.config import Config, PruneConfig
from fedsys.data import Dataset, Images
from fedsys.errors import ConfigError, ModelError
from fedsys.graph import trace
from fedsys.pruning.architecture import load as load_dense
from fedsys.pruning.architecture import save as save_dense
from fedsys.pruning.channels import Coupling
from fedsys.pruning.constants import Borders
from fedsys.pruning.masks import Masks, held, last_layer
from fedsys.pruning.measuring import front, latencies, machine, macs, peak_bytes
from fedsys.pruning.penalty import channel_scales
from fedsys.pruning.plan import Plan, evaluation_graph, masked_copy, probes
from fedsys.pruning.portfolio import PARENT, About, Content, Latency, Portfolio, Variant
from fedsys.pruning.precision import HALVES, OnnxModule, halved, int8
from fedsys.pruning.scores import coupled_layers
from fedsys.pruning.settings import CHANNEL_METHODS
from fedsys.pruning.shrink import Shrunk, count_parameters, shrink
from fedsys.pruning.sparsify import one_shot
from fedsys.randomness import Address

EVAL_BATCH = 250
"""Images that are scored at a time."""

CALIBRATION = 512
"""Training images on which the scales of int8 are found."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """A masked model.

    Attributes:
        name: Name of the variant that is made of it.
        model: Its weights; where `masks` prune, they count as zero.
        masks: What is pruned.
        made: How, in words.
    """

    name: str
    model: nn.Module
    masks: Masks
    made: str


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A dense model before it is measured.

    Attributes:
        variant: Its figures as far as they are known.
        content: What is saved of it.
        module: What answers.
    """

    variant: Variant
    content: Content
    module: nn.Module


@dataclass(slots=True)
class Stopwatch:
    """Seconds by part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the duration of the block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + took


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a model.

    Attributes:
        portfolio: As it is on the disk.
        measured: All candidates with their figures, those that were refused too.
        refused: Why, by name.
        seconds: By part of the work.
    """

    portfolio: Portfolio
    measured: tuple[Variant, ...]
    refused: Mapping[str, str]
    seconds: Mapping[str, float]


# --------------------------------------------------------------------------------------------------
# Levels


def levels(model: nn.Module, config: Config, dataset: Dataset) -> Iterator[Level]:
    """Prune `model` to every sparsity of ``pruning.sparsity``, each from the model as it is.

    Raises:
        ConfigError: The method is unknown, or an argument out of range.
        ModelError: A layer would lose all its weights; names it.
    """
    pruning = config.pruning
    leave = last_layer(model) if pruning.leave is None else pruning.leave
    dense = Masks.dense(model, leave)
    more: dict[str, Any] = {}
    if pruning.method in ("snip", "grasp"):
        count = -(-pruning.examples // config.client.batch_size)
        more["batches"] = list(islice(_batches(config, dataset), count))
    if pruning.method in CHANNEL_METHODS:
        more["groups"] = coupled_layers(model, dataset.input_shape)
    if pruning.method == "group_norm":
        more["scales"] = channel_scales(trace(model))
    for sparsity in pruning.sparsities:
        masks = one_shot(
            pruning.method,
            model,
            sparsity,
            masks=dense,
            scope=pruning.scope,
            keep_channels=pruning.keep_channels,
            address=Address(config.seed),
            input_shape=dataset.input_shape,
            mix=pruning.mix,
            iterations=pruning.iterations,
            **more,
        )
        name = f"{pruning.method}-{100 * sparsity:g}"
        made = f"{100 * sparsity:g} % of the weights pruned by {pruning.method}"
        yield Level(name, model, masks, made)


def refined(level: Level, config: Config, dataset: Dataset) -> Level:
    """Take BatchNorm's statistics anew and train under the mask, as far as ``prune`` asks for it.

    Both happen before the conversion, so that the dense model equals a masked one.
    """
    options = config.prune
    normalised = any(_tracks(module) for module in level.model.modules())
    if not (options.recalibrate and normalised) and not options.fine_tune:
        return level
    model, made = copy.deepcopy(level.model), level.made
    level.masks.apply(model)
    if options.fine_tune:
        _fine_tune(model, level.masks, config, dataset)
        made += f", {options.fine_tune} epochs of training under the mask"
    if options.recalibrate and normalised:
        _recalibrate(model, options.recalibrate, dataset)
        made += ", BatchNorm re-calibrated"
    return Level(level.name, model, level.masks, made)


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _batches(config: Config, dataset: Dataset, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    everything = np.arange(len(dataset.train), dtype=np.int64)
    size = config.client.batch_size
    address = Address(config.seed, round=epoch + 1)
    return data.train_batches(dataset.train, everything, dataset, size, address, 0, 0)


def _fine_tune(model: nn.Module, masks: Masks, config: Config, dataset: Dataset) -> None:
    optimizer = optimizers.make_optimizer(model.parameters(), config.client, config.client.lr)
    with held(masks, model, optimizer):
        for epoch in range(config.prune.fine_tune):
            address = Address(config.seed, round=epoch + 1)
            training.train(model, optimizer, _batches(config, dataset, epoch), address)


def _recalibrate(model: nn.Module, examples: int, dataset: Dataset) -> None:
    """Replace BatchNorm's running statistics by the mean over the first `examples` images."""
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and _tracks(m)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for x, _ in data.eval_batches(first(dataset.train, examples), dataset, EVAL_BATCH):
            if len(x) > 1:
                model(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()


def first(images: Images, count: int) -> Images:
    """Return the first images of a part."""
    return images.take(np.arange(min(count, len(images)), dtype=np.int64))


# --------------------------------------------------------------------------------------------------
# Candidates


def parent_candidate(model: nn.Module, input_shape: Sequence[int]) -> Candidate:
    """Return the unpruned model as a candidate: its graph in evaluation, in float32.

    Raises:
        ModelError: It does not trace, run on such an input or return one tensor.
    """
    graph = evaluation_graph(masked_copy(model, None)).float()
    try:
        output = _outputs(graph, probes(input_shape))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the model does not run on an input of shape {tuple(input_shape)}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns a {type(output).__name__}; it must return one tensor")
    content = _as_saved(graph)
    variant = Variant(
        name=PARENT,
        accuracy=0.0,
        params=count_parameters(content),
        macs=macs(content, input_shape),
        bytes=0,
        peak_bytes=0,
        latencies=(),
        made="the unpruned model",
        max_abs_output=float(output.abs().max()),
    )
    return Candidate(variant, content, content)


def convert(
    level: Level, options: PruneConfig, input_shape: Sequence[int], say: Callable[[Plan], None]
) -> tuple[Candidate, Shrunk]:
    """Return the dense model of a level, verified.

    Args:
        level: The masked model.
        options: How borders, sums and numbers of channels are treated.
        input_shape: Of one input without the batch.
        say: Is told what will be removed, before it is.

    Raises:
        ModelError: As `fedsys.pruning.shrink.shrink`.
    """
    small = shrink(
        level.model,
        input_shape,
        masks=level.masks,
        borders=Borders(options.borders),
        coupling=Coupling(options.coupling),
        round_to=options.round_to,
        announce=say,
    )
    content = _as_saved(small.model)
    variant = Variant(
        name=level.name,
        accuracy=0.0,
        params=small.report.parameters,
        macs=macs(content, input_shape),
        bytes=0,
        peak_bytes=0,
        latencies=(),
        sparsity=level.masks.figures().sparsity,
        made=level.made,
        max_abs_diff=small.report.max_abs_diff,
        max_abs_output=small.report.max_abs_output,
        channels=tuple((edit.name, edit.before, edit.after) for edit in small.plan.edits),
    )
    return Candidate(variant, content, content), small


def _as_saved(model: fx.GraphModule) -> fx.GraphModule:
    """Return what a reader of the saved model will get; names what cannot be saved as data."""
    with TemporaryDirectory(prefix="fedsys-dense-") as name:
        return load_dense(save_dense(model, name))


def lower(candidate: Candidate, precision: str, config: Config, dataset: Dataset) -> Candidate:
    """Return a candidate of float32 in another precision.

    Raises:
        ModelError: int8 needs a package that is not installed, or an operation that it has not.
    """
    model = candidate.content
    assert isinstance(model, fx.GraphModule)
    content: Content
    module: nn.Module
    if precision in HALVES:
        content = module = halved(model, precision)
    else:
        some = first(dataset.train, CALIBRATION)
        content = int8(model, [x for x, _ in data.eval_batches(some, dataset, 64)])
        module = OnnxModule(content)
    inputs = probes(dataset.input_shape)
    difference = (_outputs(module, inputs) - _outputs(model, inputs)).abs().max()
    variant = dataclasses.replace(
        candidate.variant,
        name=f"{candidate.variant.name}-{precision}",
        precision=precision,
        made=f"{candidate.variant.made}, in {precision}",
        max_abs_diff=float(difference),
    )
    return Candidate(variant, content, module)


def _outputs(model: nn.Module, inputs: Tensor) -> Any:
    with torch.inference_mode():
        return model(inputs)


# --------------------------------------------------------------------------------------------------
# Figures


def score(module: nn.Module, images: Images, dataset: Dataset) -> float:
    """Return the share of images that a model gets right."""
    return training.evaluate(module, data.eval_batches(images, dataset, EVAL_BATCH)).accuracy


def measured(
    candidates: Sequence[Candidate], options: PruneConfig, dataset: Dataset, watch: Stopwatch
) -> list[Candidate]:
    """Return the candidates with validation accuracy and latency.

    Raises:
        ConfigError: There is no validation part to choose by.
    """
    if not len(dataset.validation):
        rule = "must be above 0: variants are chosen on the validation part"
        raise ConfigError.of("data.validation", 0.0, rule, "try data.validation=0.1")
    with watch.of("accuracy"):
        accuracies = [score(c.module, dataset.validation, dataset) for c in candidates]
    with watch.of("latency"):
        times: Mapping[str, tuple[Latency, ...]] = latencies(
            {c.variant.name: c.module for c in candidates},
            dataset.input_shape,
            batch_sizes=options.batch_sizes,
            threads=options.threads,
            runs=options.runs,
        )
    return [
        dataclasses.replace(
            candidate,
            variant=dataclasses.replace(
                candidate.variant, accuracy=accuracy, latencies=times[candidate.variant.name]
            ),
        )
        for candidate, accuracy in zip(candidates, accuracies, strict=True)
    ]


# --------------------------------------------------------------------------------------------------
# All of it


def make(
    parent: nn.Module,
    masked: Iterator[Level],
    config: Config,
    dataset: Dataset,
    folder: Path,
    *,
    source: str = "",
    say: Say = lambda text: None,
) -> Made:
    """Make a portfolio of `parent` and of all masked models that are worth it.

    Args:
        parent: The unpruned model, trained.
        masked: Its levels; may be made as they are asked for.
        config: The groups ``prune``, ``pruning``, ``client``, ``model`` and the seed.
        dataset: Validation chooses, test is scored once.
        folder: Of the portfolio.
        source: Where the parent comes from, in words.
        say: Takes what a person wants to read meanwhile.

    Raises:
        ConfigError: A value does not fit, or there is no validation part.
        ModelError: A model does not trace or cannot be converted, or no variant loses as little
            accuracy as ``prune.max_drop`` asks for.
        RunError: A file cannot be written.
    """
    options, watch = config.prune, Stopwatch()
    with watch.of("convert"):
        candidates = [parent_candidate(parent, dataset.input_shape)]
    while True:
        with watch.of("mask"):
            level = next(masked, None)
        if level is None:
            break
        with watch.of("refine"):
            level = refined(level, config, dataset)
        with watch.of("convert"):
            candidate, small = convert(
                level, options, dataset.input_shape, _announcing(level.name, say)
            )
        report = small.report
        say(
            f"{level.name}: {report.parameters:,} of {report.parameters_before:,} parameters in "
            f"{report.seconds:.2f} s, difference {report.max_abs_diff:.1e} at outputs up to "
            f"{report.max_abs_output:.3g}"
        )
        candidates.append(candidate)
    with watch.of("precision"):
        for precision in options.precisions:
            plain = [c for c in candidates if c.variant.precision == "float32"]
            say(f"making {len(plain)} variants of {precision}")
            candidates += [lower(c, precision, config, dataset) for c in plain]
    say(f"measuring {len(candidates)} models on {machine()}")
    candidates = measured(candidates, options, dataset, watch)
    return _chosen(candidates, config, dataset, folder, source, watch)


def _announcing(name: str, say: Say) -> Callable[[Plan], None]:
    return lambda plan: say(f"{name}: {plan}")


def _chosen(
    candidates: Sequence[Candidate],
    config: Config,
    dataset: Dataset,
    folder: Path,
    source: str,
    watch: Stopwatch,
) -> Made:
    options = config.prune
    everything = [candidate.variant for candidate in candidates]
    stay, refused = front(everything, options.margin, options.max_drop)
    _check_objective(everything, options)
    by_name = {c.variant.name: c for c in candidates}
    about = About(
        model=dict(config.model),
        classes=dataset.classes,
        input_shape=dataset.input_shape,
        mean=dataset.mean,
        std=dataset.std,
        machine=machine(),
        source=source,
    )
    kept = [by_name[variant.name] for variant in stay]
    if options.memory:
        with watch.of("memory"), TemporaryDirectory(prefix="fedsys-portfolio-") as name:
            Portfolio.write(Path(name), about, [(c.variant, c.content) for c in kept])
            names = [c.variant.name for c in kept]
            peaks = peak_bytes(Path(name), names, options.batch_sizes[0])
        kept = [_with(c, peak_bytes=peaks[c.variant.name]) for c in kept]
    if len(dataset.test):
        with watch.of("test"):
            kept = [_with(c, test_accuracy=score(c.module, dataset.test, dataset)) for c in kept]
    with watch.of("write"):
        portfolio = Portfolio.write(folder, about, [(c.variant, c.content) for c in kept])
    return Made(portfolio, tuple(everything), refused, watch.seconds)


def _with(candidate: Candidate, **figures: Any) -> Candidate:
    variant = dataclasses.replace(candidate.variant, **figures)
    return dataclasses.replace(candidate, variant=variant)


def _check_objective(variants: Sequence[Variant], options: PruneConfig) -> None:
    parent, others = variants[0], variants[1:]
    if options.max_drop is None or not others:
        return
    best = max(others, key=lambda variant: variant.accuracy)
    drop = parent.accuracy - best.accuracy
    if drop > options.max_drop:
        raise ModelError(
            f"no variant meets prune.max_drop={options.max_drop:g}: the best, {best.name}, has "
            f"{best.accuracy:.2%} on the validation part, the parent {parent.accuracy:.2%}; lower "
            "pruning.sparsity, raise prune.max_drop, or train under the mask with prune.fine_tune=1"
        )
