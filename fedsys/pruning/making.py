"""From one model to a portfolio: masks, optional training under them, conversion, measuring.

Every *level* (`fedsys.pruning.levels`) is a masked model; the conversion makes a *candidate* of it
(`fedsys.pruning.candidates`), and lower precisions of a candidate are candidates too. `measured`
gives all of them their figures, `fedsys.pruning.measuring` decides by these, on the validation
part, which ones stay. Only then is the test part scored, once.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from fedsys import data
from fedsys.config import Config, VariantsConfig, secret
from fedsys.data import Dataset, Images
from fedsys.errors import ConfigError, FedsysError, ModelError
from fedsys.pruning.candidates import Candidate, convert, lower, lowered_name, parent_candidate
from fedsys.pruning.dense.channels import Multiples
from fedsys.pruning.dense.removal import Removal
from fedsys.pruning.dense.shrink import Shrunk
from fedsys.pruning.export import export_onnx
from fedsys.pruning.levels import EVAL_BATCH, Done, Level, Recipe, epochs_of, refined, spread
from fedsys.pruning.measuring import front, latencies, machine, peak_bytes
from fedsys.pruning.portfolio import About, Latency, Portfolio, Variant
from fedsys.pruning.precision import OnnxModule
from fedsys.pruning.rounding import AUTO, Rounding, decided
from fedsys.runs.progress import Progress
from fedsys.training import plain as training

Say = Callable[[str], None]

COMPARED = 32
"""Images of the validation part on which a dense model is compared with its masked one."""


@dataclass(slots=True)
class Durations:
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
        rounding: With ``variants.round_to=auto``, what each level keeps more channels in.
    """

    portfolio: Portfolio
    measured: tuple[Variant, ...]
    refused: Mapping[str, str]
    seconds: Mapping[str, float]
    rounding: Mapping[str, Rounding] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------
# Figures


def score(module: nn.Module, images: Images, dataset: Dataset) -> float:
    """Return the share of images that a model gets right."""
    return training.evaluate(module, data.eval_batches(images, dataset, EVAL_BATCH)).accuracy


def measured(
    candidates: Sequence[Candidate], options: VariantsConfig, dataset: Dataset, watch: Durations
) -> list[Candidate]:
    """Return the candidates with validation accuracy and latency."""
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
    masked: Sequence[Recipe],
    config: Config,
    dataset: Dataset,
    folder: Path,
    *,
    source: str = "",
    say: Say = lambda text: None,
    shown: Progress | None = None,
) -> Made:
    """Make a portfolio of `parent` and of all masked models that are worth it.

    Args:
        parent: The unpruned model, trained.
        masked: How its levels are made. One that cannot be made is refused like one that is slow,
            and so is one of fewer bits.
        config: The groups ``prune``, ``pruning``, ``client``, ``model`` and the seed.
        dataset: Validation chooses, test is scored once.
        folder: Of the portfolio.
        source: Where the parent comes from, in words.
        say: Takes what a person wants to read meanwhile.
        shown: Shows how far training under the masks is, epoch by epoch; None shows nothing.

    Raises:
        ConfigError: A value does not fit, or there is no validation part.
        ModelError: The model does not trace, no level can be made or converted, or no variant
            loses as little accuracy as ``variants.max_drop`` asks for.
        RunError: A file cannot be written.
    """
    options, watch = config.variants, Durations()
    _check_validation(dataset)
    with watch.of("convert"):
        images = _some(dataset)
        candidates = [parent_candidate(parent, options, dataset.input_shape, images)]
    failed: dict[str, FedsysError] = {}
    rounding: dict[str, Rounding] = {}
    epoch_done = _epochs(masked, config, shown)
    for recipe in masked:
        try:
            level = _level(recipe, config, dataset, watch, epoch_done)
            if options.round_to == AUTO:
                candidate, rounding[level.name] = _rounded(level, options, images, watch, say)
                candidates.append(candidate)
            else:
                candidates += _candidates(level, options, images, watch, say)
        except (ConfigError, ModelError) as error:
            failed[recipe.name] = error
            say(f"{recipe.name}: {error}")
    if failed and len(candidates) == 1:
        raise next(iter(failed.values()))
    with watch.of("precision"):
        candidates += _lowered(candidates, options.precisions, dataset, failed, say)
    say(f"measuring {len(candidates)} models on {machine()}")
    candidates = measured(candidates, options, dataset, watch)
    made = _chosen(candidates, config, dataset, folder, source, watch)
    reasons = {name: str(error) for name, error in failed.items()}
    return dataclasses.replace(made, refused={**made.refused, **reasons}, rounding=rounding)


def _lowered(
    candidates: Sequence[Candidate],
    precisions: Sequence[str],
    dataset: Dataset,
    failed: dict[str, FedsysError],
    say: Say,
) -> list[Candidate]:
    """Return candidates of fewer bits; those that cannot be made are added to `failed`."""
    made = []
    for precision in precisions:
        say(f"making {len(candidates)} variants of {precision}")
        for candidate in candidates:
            try:
                made.append(lower(candidate, precision, dataset))
            except ModelError as error:
                name = lowered_name(candidate, precision)
                failed[name] = error
                say(f"{name}: {error}")
    return made


def _check_validation(dataset: Dataset) -> None:
    if not len(dataset.validation):
        rule = "must be above 0: variants are chosen on the validation part"
        raise ConfigError.of("data.validation", 0.0, rule, "try data.validation=0.1")


def _some(dataset: Dataset) -> Tensor:
    """Return the images on which dense models are compared with masked ones."""
    images: Tensor
    ((images, _),) = data.eval_batches(spread(dataset.validation, COMPARED), dataset, COMPARED)
    return images


def _epochs(levels: Sequence[Recipe], config: Config, shown: Progress | None) -> Done:
    """Begin to show epochs of training under all masks; return what is told of each."""
    total = sum(epochs_of(config, trained=level.trained) for level in levels)
    done = itertools.count(1)
    if shown is None or not total:
        return lambda score, seconds: None
    shown.start(total, "training under the masks, by epoch")

    def epoch_done(score: training.Score, seconds: float) -> None:
        shown.round_done({"round": next(done), "train_loss": score.loss, "seconds_round": seconds})

    return epoch_done


def _level(
    recipe: Recipe, config: Config, dataset: Dataset, watch: Durations, epoch_done: Done
) -> Level:
    with watch.of("mask"):
        level = recipe.make()
    with watch.of("refine"):
        return refined(level, config, dataset, epoch_done)


def _candidates(
    level: Level, options: VariantsConfig, images: Tensor, watch: Durations, say: Say
) -> list[Candidate]:
    """Return the dense model of a level and, if channels shall be rounded, one with more of them.

    Both are measured: more channels are faster on some processors only.
    """
    candidates = [_converted(level, options, images, watch, say, 1)[0]]
    if isinstance(options.round_to, int) and options.round_to > 1:
        rounded = dataclasses.replace(
            level,
            name=f"{level.name}-round{options.round_to}",
            made=f"{level.made}, channels rounded up to multiples of {options.round_to}",
        )
        more, _ = _converted(rounded, options, images, watch, say, options.round_to)
        if more.variant.channels != candidates[0].variant.channels:
            candidates.append(more)
    return candidates


def _rounded(
    level: Level, options: VariantsConfig, images: Tensor, watch: Durations, say: Say
) -> tuple[Candidate, Rounding]:
    """Return the dense model of a level with more channels where that is faster, and where."""
    exact, small = _converted(level, options, images, watch, say, 1)
    with watch.of("rounding"):
        decision = decided(small.plan, options, images.shape[1:])
    say(f"{level.name}: {decision}")
    if not decision.round_to:
        return exact, decision
    made = f"{level.made}, channels of {len(decision.rounded)} groups of layers rounded up"
    wider = dataclasses.replace(level, made=f"{made} for {decision.engine}")
    return _converted(wider, options, images, watch, say, decision.round_to)[0], decision


def _converted(
    level: Level,
    options: VariantsConfig,
    images: Tensor,
    watch: Durations,
    say: Say,
    round_to: Multiples,
) -> tuple[Candidate, Shrunk]:
    with watch.of("convert"):
        announce = _announcing(level.name, say)
        candidate, small = convert(level, options, images.shape[1:], announce, images, round_to)
    report, variant = small.report, candidate.variant
    say(
        f"{level.name}: {report.parameters:,} of {report.parameters_before:,} parameters in "
        f"{report.seconds:.2f} s, difference {variant.max_abs_diff:.1e} at outputs up to "
        f"{variant.max_abs_output:.3g}, {variant.other_answers} of {variant.compared_images} "
        "validation images answered otherwise"
    )
    return candidate, small


def _announcing(name: str, say: Say) -> Callable[[Removal], None]:
    return lambda plan: say(f"{name}: {plan}")


def _chosen(
    candidates: Sequence[Candidate],
    config: Config,
    dataset: Dataset,
    folder: Path,
    source: str,
    watch: Durations,
) -> Made:
    options = config.variants
    everything = [candidate.variant for candidate in candidates]
    stay, refused = front(everything, options.margin, options.max_drop)
    _check_objective(everything, options)
    by_name = {c.variant.name: c for c in candidates}
    about = About(
        model=secret.public(config.model),
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
    kept, onnx = _with_onnx(kept, options, dataset, watch) if options.onnx else (kept, {})
    with watch.of("write"):
        portfolio = Portfolio.write(folder, about, [(c.variant, c.content) for c in kept], onnx)
    return Made(portfolio, tuple(everything), refused, watch.seconds)


def _with_onnx(
    kept: Sequence[Candidate], options: VariantsConfig, dataset: Dataset, watch: Durations
) -> tuple[list[Candidate], dict[str, bytes]]:
    """Return variants with the latency of ONNX Runtime beside that of PyTorch, and their files.

    Both are measured in turns: which one answers is decided by that (`fedsys.serving.computing`).
    """
    found, files = [], {}
    with watch.of("onnx"), TemporaryDirectory(prefix="fedsys-onnx-") as folder:
        for candidate in kept:
            name = candidate.variant.name
            if candidate.variant.precision != "float32":
                found.append(candidate)
                continue
            path = Path(folder) / f"{name}.onnx"
            difference = export_onnx(candidate.module, dataset.input_shape, path)
            files[name] = path.read_bytes()
            both = latencies(
                {"torch": candidate.module, "onnx": OnnxModule(files[name])},
                dataset.input_shape,
                batch_sizes=options.batch_sizes,
                threads=options.threads,
                runs=options.runs,
            )
            figures = {"latencies": both["torch"], "onnx_latencies": both["onnx"]}
            found.append(_with(candidate, **figures, onnx_max_abs_diff=difference))
    return found, files


def _with(candidate: Candidate, **figures: Any) -> Candidate:
    variant = dataclasses.replace(candidate.variant, **figures)
    return dataclasses.replace(candidate, variant=variant)


def _check_objective(variants: Sequence[Variant], options: VariantsConfig) -> None:
    parent, others = variants[0], variants[1:]
    if options.max_drop is None or not others:
        return
    best = max(others, key=lambda variant: variant.accuracy)
    drop = parent.accuracy - best.accuracy
    if drop > options.max_drop:
        raise ModelError(
            f"no variant meets variants.max_drop={options.max_drop:g}: the best, {best.name}, has "
            f"{best.accuracy:.2%} on the validation part, the parent {parent.accuracy:.2%}; lower "
            "pruning.sparsity, raise variants.max_drop, or train under the mask with "
            "variants.fine_tune=1"
        )
