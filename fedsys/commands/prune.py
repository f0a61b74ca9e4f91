"""``fedsys prune``: from one model to a portfolio of small dense variants.

With ``run=RUN`` the model is that of a finished run of ``fedsys train``, with its data; a run that
was pruned while it trained brings its masks, and one that rewound brings a model for each level.
Without it the model is the untrained one of the configuration: nothing is learned from its
accuracy, everything from what the conversion makes of its masks.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fedsys import config as configuration
from fedsys.config import Config, secret
from fedsys.data import Dataset
from fedsys.errors import ConfigError, ModelError, RunError
from fedsys.files import write_atomic
from fedsys.pruning.levels import Level, Recipe, recipes
from fedsys.pruning.making import Made, make
from fedsys.pruning.pictures import draw_all
from fedsys.pruning.portfolio import Portfolio, Variant
from fedsys.runs import progress, resume
from fedsys.runs.folder import RunFolder, default_path
from fedsys.runs.progress import Progress
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.masks import Masks

MODEL = "model.safetensors"
MASKS = "masks.safetensors"
LEVELS = "levels"
CLASSES = "classification"
_FROM_RUN = ("model", "strategy", "policy", "num_clients", "rounds")
"""Keys that a run has settled already."""


def job(tree: Any) -> Mapping[str, Any]:
    """Make the portfolio that the composed configuration describes, in a new run folder.

    Args:
        tree: The composed configuration (a DictConfig).

    Returns:
        ``variants``: figures of those that stay, ``refused``: reasons by name, ``seconds`` by part
        of the work, ``portfolio``: its folder, ``run_dir``, with ``variants.onnx=true``
        ``onnx``: paths of the files by name, and with ``variants.round_to=auto`` ``rounding``:
        by level what was rounded up, and what was measured (`Rounding.figures`).

    Raises:
        FedsysError: The configuration is not usable, or no portfolio can be made.
    """
    began = time.perf_counter()
    values, run = _asked(tree)
    path = Path(tree.run.dir or default_path(Path("outputs"), "prune")).absolute()
    config = configuration.parse(configuration.to_text({**values, "run": {"dir": str(path)}}))
    with RunFolder.create(path, config.text) as folder:
        with progress.choose(config.json) as shown:
            made = _make(config, run, path / "portfolio", shown)
        draw_all(made.measured, made.portfolio, path / "plots")
        files = _written(made.portfolio, path / "onnx") if config.variants.onnx else {}
        rounding = {name: decision.figures() for name, decision in made.rounding.items()}
        seconds = {part: round(value, 3) for part, value in made.seconds.items()}
        result: dict[str, Any] = {
            "variants": [_figures(v, made.portfolio.parent) for v in made.portfolio.variants],
            "accuracies": {v.name: v.accuracy for v in made.measured},
            "refused": dict(made.refused),
            "seconds": {**seconds, "total": round(time.perf_counter() - began, 3)},
            **({"rounding": rounding} if rounding else {}),
            "portfolio": str(made.portfolio.folder),
            **({"onnx": files} if files else {}),
            "run_dir": str(path),
        }
        folder.finish(result)
    show(made)
    return result


def _asked(tree: Any) -> tuple[dict[str, Any], Path | None]:
    """Return the configuration of a portfolio, and the run of its parent.

    Raises:
        ConfigError: It is not usable.
    """
    run = Path(str(tree.variants.run)).absolute() if tree.variants.run else None
    if tree.variants.trained and run is None:
        rule = "must come with run=PARENT: their variants join those of that run"
        raise ConfigError.of("variants.trained", list(tree.variants.trained), rule)
    values = _of_run(tree, run) if run else configuration.plain(tree)
    _need_classes(str(values.get("task", {}).get("kind", CLASSES)), run)
    configuration.parse(configuration.to_text(values))  # said before a folder is made
    return values, run


def unpruned(tree: Any, folder: Path) -> Portfolio:
    """Make a portfolio of one model as it is, without variants: what serves a run, or an object.

    Args:
        tree: As for `job`; of ``variants`` only what is measured counts.
        folder: Of the portfolio.

    Raises:
        FedsysError: As `job` does.
    """
    values, run = _asked(tree)
    config = configuration.parse(configuration.to_text(values))
    model, dataset = _model(config, run)
    parent = model if run is None else of_run(run, model, config, dataset)[0]
    source = "an object of Python" if run is None else f"run {run.name}"
    return make(parent, [], config, dataset, folder, source=source).portfolio


def _model(config: Config, run: Path | None) -> tuple[nn.Module, Dataset]:
    training.set_threads(config.client.threads)
    dataset = federation.federation(config).dataset
    if not (config.task.usual and dataset.pictures):
        _refuse(f"task={config.task.kind} on {dataset.name}", run)
    return federation.build_model(config, dataset, initial=run is None), dataset


def _need_classes(task: str, run: Path | None) -> None:
    """Refuse another task before the methods of pruning are, of which some could do it."""
    if task != CLASSES:
        _refuse(f"task={task}", run)


def _refuse(what: str, run: Path | None) -> NoReturn:
    raise ConfigError.of(
        "variants.run", run,
        f"must be of images in classes, and this is {what}: "
        "variants are compared by right answers and answer to images",
        "pruning=magnitude in fedsys train prunes others while they learn",
    )  # fmt: skip


def _make(config: Config, run: Path | None, folder: Path, shown: Progress) -> Made:
    model, dataset = _model(config, run)
    if run is None:
        source = f"an untrained model, seed {config.seed}"
        return make(
            model,
            recipes(model, config, dataset),
            config,
            dataset,
            folder,
            source=source,
            say=shown.note,
            shown=shown,
        )
    further = any(key.partition(".")[0] == "pruning" for key in configuration.given_keys())
    parent, masked = of_run(run, model, config, dataset, further=further)
    masked += trained_further(config, dataset)
    source = f"run {run.name}"
    return make(parent, masked, config, dataset, folder, source=source, say=shown.note, shown=shown)


def _written(portfolio: Portfolio, folder: Path) -> dict[str, str]:
    """Write the ONNX files of variants of full precision once more, each under its name.

    Returns:
        The file of each variant.
    """
    files = {}
    folder.mkdir(exist_ok=True)
    for variant in portfolio.variants:
        if variant.precision == "float32":
            file, difference = folder / f"{variant.name}.onnx", variant.onnx_max_abs_diff
            write_atomic(file, portfolio.onnx(variant.name))
            _say(f"{file}: differs from {variant.name} by {difference:.1e}")
            files[variant.name] = str(file)
    return files


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _figures(variant: Variant, parent: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "accuracy": variant.accuracy,
        "test_accuracy": variant.test_accuracy,
        "params": variant.params,
        "parent_params": parent.params,
        "macs": variant.macs,
        "bytes": variant.bytes,
        "peak_bytes": variant.peak_bytes,
        "precision": variant.precision,
        "sparsity": variant.sparsity,
        "source": variant.source,
        "p50_ms": variant.p50_ms,
        "p95_ms": variant.p95_ms,
        "max_abs_diff": variant.max_abs_diff,
        "max_abs_output": variant.max_abs_output,
        "compared_images": variant.compared_images,
        "other_answers": variant.other_answers,
    }


# --------------------------------------------------------------------------------------------------
# What a run left behind


def _of_run(tree: Any, run: Path) -> dict[str, Any]:
    """Return the configuration of the run, with the groups of the command line that prune it.

    Raises:
        ConfigError: The folder is not that of a finished ``fedsys train``, or the command line
            names what the run has settled.
    """
    asked, given = configuration.plain(tree), configuration.given_keys()
    for key in given:
        if key.partition(".")[0] in _FROM_RUN:
            rule = f"must not be given with run={run}, which settles it"
            raise ConfigError.of(key, _at(asked, key), rule, "leave it out")
    own = configuration.with_present_names(run_config(run))
    groups = ("variants", "pruning", "json", "run", "resilience")  # what is pruned is the backbone
    values = {**own, **{key: asked[key] for key in groups}, "resume": None}
    for key in given:
        group, *rest = key.split(".")
        if group in ("data", "client") and rest and isinstance(values.get(group), dict):
            inner = values[group]
            for part in rest[:-1]:
                inner = inner.setdefault(part, {})
            inner[rest[-1]] = _at(asked, key)
        elif group == "data":
            values["data"] = asked["data"]
    return values


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def run_config(run: Path, key: str = "run") -> dict[str, Any]:
    """Return the configuration that the model of a finished run belongs to.

    Args:
        run: Its folder.
        key: What named it.

    Raises:
        ConfigError: The folder does not exist, or is not that of a finished ``fedsys train``.
    """
    rule = "must be the folder of a finished fedsys train"
    try:
        info = RunFolder.open(run).info
    except RunError as error:
        raise ConfigError.of(key, run, rule, str(error)) from error
    if not (run / MODEL).is_file():
        status = info["status"]
        missing = f"this run is {status}" if status != "finished" else f"this one has no {MODEL}"
        raise ConfigError.of(key, run, rule, missing)
    try:
        with safe_open(run / MODEL, framework="pt") as file:
            own = yaml.safe_load((file.metadata() or {})["config"])
    except (OSError, SafetensorError, KeyError, yaml.YAMLError) as error:
        raise ModelError(
            f"{run / MODEL} is damaged or not of fedsys train: {error!r}; train again"
        ) from error
    if not isinstance(own, dict):
        raise ModelError(f"{run / MODEL} is damaged: it has no configuration; train again")
    return _with_secrets(own, run)


def _with_secrets(own: dict[str, Any], run: Path) -> dict[str, Any]:
    """Return the configuration of a model with what its file leaves out and its folder has."""
    if secret.MASK not in str(own):
        return own
    with contextlib.suppress(RunError):
        whole = {**resume.stored(run), "resume": None}
        if secret.public(whole) == own:
            return whole
    return own


def of_run(
    run: Path, model: nn.Module, config: Config, dataset: Dataset, *, further: bool = False
) -> tuple[nn.Module, list[Recipe]]:
    """Return the parent and the levels of a run: its own masks if it has some, else new ones.

    Args:
        run: Folder of the run.
        model: Of its architecture; gets its weights.
        config: ``pruning`` says what is pruned.
        dataset: Its data.
        further: Whether a run that has pruned is pruned beyond its masks, the last of several, too.

    Raises:
        ModelError: A file is damaged, or does not fit the model.
    """
    fill(model, run / MODEL)
    trained = sorted((run / LEVELS).glob("level-*.masks.safetensors"))
    if trained:
        parent = _like(model, trained[0].with_name(trained[0].name.replace(".masks", "")))
        found = _trained_levels(model, trained)
        if further and config.pruning.active:
            last = _like(model, trained[-1].with_name(trained[-1].name.replace(".masks", "")))
            found += recipes(last, config, dataset, Masks.load(trained[-1]))
        return parent, found
    if (run / MASKS).is_file():
        masks = Masks.load(run / MASKS)
        sparsity = 100 * masks.figures().sparsity
        made = f"{sparsity:.4g} % of the weights pruned in training"
        level = Level(f"trained-{sparsity:.4g}", model, masks, made, trained=True)
        found = [Recipe(level.name, lambda: level, trained=True)]
        if further and config.pruning.active:
            found += recipes(model, config, dataset, masks)
        return model, found
    if config.variants.trained and not config.pruning.active:
        return model, []
    return model, recipes(model, config, dataset)


def trained_further(config: Config, dataset: Dataset) -> list[Recipe]:
    """Return the models of ``variants.trained``: runs that went on from variants of a portfolio.

    Args:
        config: ``variants.trained``.
        dataset: The parent's data.

    Raises:
        ConfigError: A folder is not that of a finished ``fedsys train``, or its data are not those
            of the parent: it may have trained on what it would be chosen by.
        ModelError: A file is damaged.
    """
    found: list[Recipe] = []
    for given in config.variants.trained:
        run = Path(given).expanduser().absolute()
        own = run_config(run, "variants.trained")
        settings = configuration.parse(configuration.to_text({**own, "resume": None}))
        _check_data(run, federation.federation(settings).dataset, dataset)
        taken = {recipe.name for recipe in found}
        found.append(_trained_further(run, settings, dataset, taken))
    return found


def _check_data(run: Path, own: Dataset, dataset: Dataset) -> None:
    same = (own.classes, own.mean, own.std) == (dataset.classes, dataset.mean, dataset.std)
    for part in ("validation", "test"):
        mine, other = getattr(own, part), getattr(dataset, part)
        same = same and torch.equal(mine.pixels, other.pixels)
        same = same and torch.equal(mine.labels, other.labels)
    if not same:
        rule = "must have trained on the data of run=, with the same validation and test parts"
        raise ConfigError.of(
            "variants.trained", run, rule, "give it the data= and seed= of that run"
        )


def _trained_further(run: Path, own: Config, dataset: Dataset, taken: set[str]) -> Recipe:
    model = federation.build_model(own, dataset, initial=False)
    path = own.model.get("path")
    kind = Path(str(path)).name if path else str(own.model["_target_"]).rpartition(".")[2]
    stem = f"{re.sub(r'[^A-Za-z0-9._-]', '-', kind)}-trained"
    count = sum(name == stem or name.startswith(f"{stem}-") for name in taken)
    name = f"{stem}-{count + 1}" if count else stem

    def level() -> Level:
        fill(model, run / MODEL)
        masks = Masks.load(run / MASKS) if (run / MASKS).is_file() else Masks({})
        made = f"{kind}, trained further in run {run.name}"
        return Level(name, model, masks, made, True, source=str(run), origin=_origin(path))

    return Recipe(name, level, trained=True)


def _origin(path: object) -> Variant | None:
    """Return the variant in a folder, or None if its portfolio is not there any more."""
    folder = Path(str(path)).expanduser()
    try:
        return Portfolio.load(folder.parents[1]).variant(folder.name)
    except (ConfigError, ModelError, IndexError):
        return None


def _trained_levels(model: nn.Module, files: list[Path]) -> list[Recipe]:
    found = []
    for file in files:
        masks = Masks.load(file)
        sparsity = masks.figures().sparsity
        if sparsity > 0.0:
            name = f"level-{100 * sparsity:.4g}"
            made = f"{100 * sparsity:.4g} % of the weights pruned, rewound and trained again"
            weights = file.with_name(file.name.replace(".masks", ""))
            found.append(_trained(name, model, weights, masks, made))
    return found


def _trained(name: str, model: nn.Module, weights: Path, masks: Masks, made: str) -> Recipe:
    def level() -> Level:
        return Level(name, _like(model, weights), masks, made, trained=True)

    return Recipe(name, level, trained=True)


def _like(model: nn.Module, file: Path) -> nn.Module:
    return fill(copy.deepcopy(model), file)


def fill(model: nn.Module, file: Path) -> nn.Module:
    """Give `model` the state in a file, and return it.

    Raises:
        ModelError: The file cannot be read, is damaged, or is of another model.
    """
    try:
        state: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read or is damaged: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{file} does not fit the model: {error}") from error
    return model


# --------------------------------------------------------------------------------------------------
# What a person sees


def show(made: Made) -> None:
    """Print all that was measured as a table, and why some was refused, to standard error."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)  # in a file, too, no column is cut
    parent = made.portfolio.parent
    columns = ("variant", "val", "test", "parameters", "of parent", "MB", "p50 ms", "p95 ms")
    table = Table(*columns, "speed", "peak MB", "kept", box=None)
    for v in made.portfolio.variants:
        table.add_row(*_cells(v, parent), f"{v.peak_bytes / 1e6:.3g}", "yes")
    kept = {v.name for v in made.portfolio.variants}
    for v in made.measured:
        if v.name not in kept:
            table.add_row(*_cells(v, parent), "", "no", style="dim")
    console.print(table)
    for name, reason in made.refused.items():
        console.print(f"refused {name}: {reason}", markup=False)
    console.print(f"portfolio {made.portfolio.folder}", markup=False)


def _cells(variant: Variant, parent: Variant) -> tuple[str, ...]:
    test = "" if variant.test_accuracy is None else f"{variant.test_accuracy:.2%}"
    return (
        variant.name,
        f"{variant.accuracy:.2%}",
        test,
        f"{variant.params:,}",
        f"1/{parent.params / variant.params:.3g}",
        f"{variant.bytes / 1e6:.3g}" if variant.bytes else "",
        f"{variant.p50_ms:.3g}",
        f"{variant.p95_ms:.3g}",
        f"{parent.p50_ms / variant.p50_ms:.3g} x",
    )
