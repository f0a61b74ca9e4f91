"""fedsys from Python: what the commands do, with objects where those have names.

::

    import fedsys

    run = fedsys.train("policy=fixed", "policy.cut=0.5", model=my_model, data=my_data, loss=my_loss)
    run.figures["loss"], run.model, run.history[-1], run.plots

Overrides are those of the command line, in the same words, and the model is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, final

from fedsys import config as configuration
from fedsys.config import Config, objects
from fedsys.config.task import Metric
from fedsys.errors import ConfigError, extras_named

if TYPE_CHECKING:
    from torch import nn

    from fedsys.commands.serve import Opened
    from fedsys.pruning.portfolio import Portfolio
    from fedsys.runs.callbacks import Callback
    from fedsys.runs.lines import Row


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that is finished.

    Attributes:
        path: Its folder.
        figures: What ``run.json`` says at its end: the metric of the test part under its name,
            ``loss``, ``model_sha256``, and so on.
    """

    path: Path
    figures: Mapping[str, Any]

    @functools.cached_property
    def config(self) -> Config:
        """The run as it was asked for."""
        from fedsys.runs import resume

        return configuration.parse(configuration.to_text(resume.stored(self.path)))

    @functools.cached_property
    def history(self) -> tuple[Row, ...]:
        """A row for each round, as in ``metrics.csv``: what makes a table of pandas."""
        from fedsys.runs.folder import RunFolder

        return tuple(RunFolder.open(self.path).rounds())

    @property
    def metric(self) -> Metric:
        """By what it was judged."""
        return self.config.task.measure

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained model, in evaluation mode.

        Raises:
            ConfigError: It was built from an object of another process.
        """
        from safetensors.torch import load_file

        from fedsys.training import federation

        dataset = federation.federation(self.config).dataset
        made = federation.build_model(self.config, dataset, initial=False)
        made.load_state_dict(load_file(self.path / "model.safetensors"))
        return made.eval()

    @property
    def plots(self) -> dict[str, Path]:
        """Pictures by name."""
        return {file.stem: file for file in sorted((self.path / "plots").glob("*.png"))}

    def __repr__(self) -> str:
        shown = self.metric.text(float(self.figures[self.metric.name]))
        return f"<FinishedRun {self.path.name}: test {self.metric.title} {shown}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: how it ended, and its pictures."""
        from fedsys.runs.lines import summary_lines

        lines = "".join(f"<div>{html.escape(line)}</div>" for line in summary_lines(self.figures))
        names = ", ".join(self.plots)
        return lines + (f"<div>plots {html.escape(names)}</div>" if names else "")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """What each device of a run should do.

    Attributes:
        figures: As ``fedsys plan json=true`` prints them.
    """

    figures: Mapping[str, Any]

    @property
    def devices(self) -> Sequence[Mapping[str, Any]]:
        """For each device its choice, seconds by resource, and alternatives."""
        found: Sequence[Mapping[str, Any]] = self.figures["devices"]
        return found

    @property
    def predicted_s(self) -> float:
        """Seconds of a round."""
        return float(self.figures["predicted_s"])

    @property
    def why(self) -> str:
        """The reason, in a sentence."""
        return str(self.figures["why"])


@final
class ServedModel:
    """An endpoint in this process, which answers until it is closed; a context manager.

    Args:
        opened: The context of the endpoint, and of what it needs.

    Attributes:
        address: As ``http://host:port``.
        grpc_address: As ``grpc://host:port``; None without ``serving.grpc``.
    """

    def __init__(self, opened: ExitStack, it: Opened) -> None:
        self._opened, self._it = opened, it
        self.address = it.endpoint.address
        self.grpc_address = it.endpoint.grpc_address

    def status(self) -> Mapping[str, Any]:
        """Return what answers, why, and what was seen, as ``GET /status`` does."""
        return self._it.engine.status()

    def close(self) -> Mapping[str, Any]:
        """Take no more requests, finish those in work, and return what it did; once is enough.

        Returns:
            The figures of ``fedsys serve json=true``: ``answers`` by variant, and so on.
        """
        self._opened.close()
        return self._it.figures()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __repr__(self) -> str:
        return f"<ServedModel {self.address}>"


def train(
    *overrides: str,
    model: Any = None,
    data: Any = None,
    loss: Any = None,
    metric: Any = None,
    callbacks: Sequence[Callback] = (),
) -> FinishedRun:
    """Carry out a run, as ``fedsys train`` does.

    Args:
        overrides: Such as ``"policy=auto"``.
        model: A module, or a class or function that makes one; it is given ``input_shape`` and
            ``num_classes`` if it takes them. None: the overrides say.
        data: A map-style data set of (inputs, targets), a tuple of two (training, test), or a class
            or function that makes one. None: the overrides say.
        loss: A function of (outputs, targets), or of (outputs, targets, weight), that returns the
            mean over the examples; with ``weight``, times that.
        metric: A function of (outputs, targets) that returns a number for each example, or a metric
            of torchmetrics, an object or its class.
        callbacks: Told in this process how the run goes (`fedsys.runs.callbacks`).

    Raises:
        ConfigError: A value is not usable, or an object does not travel to where it is needed.
        FedsysError: The run failed.
    """
    from fedsys.commands import train as command
    from fedsys.runs.callbacks import listening

    with listening(callbacks) as listeners:
        figures = called(command.job, overrides, model, data, loss, metric)
        listeners.end(figures)
    return FinishedRun(Path(str(figures["run_dir"])), figures)


def plan(*overrides: str, model: Any = None, data: Any = None) -> PlannedRun:
    """Say what each device of a run should do, as ``fedsys plan`` does.

    Args:
        overrides: Such as ``"fleet=pi_lab"``.
        model: As for `train`.
        data: As for `train`.

    Raises:
        ConfigError: The fleet has no machines, or a value is not usable.
    """
    from fedsys.commands import plan as command

    return PlannedRun(called(command.job, [*overrides, "json=true"], model, data, None, None))


def prune(run: FinishedRun | Path | str, *overrides: str) -> Portfolio:
    """Make small variants of the model of a run, as ``fedsys prune run=RUN`` does.

    Args:
        run: The run, or its folder.
        overrides: Such as ``"pruning.sparsity=[0.5,0.9]"``.

    Raises:
        FedsysError: The run is not usable, or no portfolio can be made.
    """
    from fedsys.commands import prune as command
    from fedsys.pruning.portfolio import Portfolio

    folder = run.path if isinstance(run, FinishedRun) else Path(run)
    own = ["+variants=portfolio", f"variants.run={_quoted(str(folder))}"]
    figures = called(command.job, overrides, None, None, None, None, own)
    return Portfolio.load(Path(str(figures["portfolio"])))


def serve(
    what: FinishedRun | Portfolio | Path | str | None = None,
    *overrides: str,
    model: Any = None,
    data: Any = None,
) -> ServedModel:
    """Answer requests from this process, as ``fedsys serve`` does, until it is closed.

    Args:
        what: A run, a portfolio, or the folder of one. A run answers by its model alone, which is
            measured first; `prune` makes a portfolio of it. None: the overrides say, or `model`.
        overrides: Such as ``"serving.objective.p95_ms=20"``. Without ``serving.address=`` it
            listens on loopback, at any port that is free.
        model: As for `train`, with its weights as they are; needs `data`.
        data: As for `train`: images, whose form and classes the model has.

    Raises:
        ConfigError: There is nothing to serve, a value is not usable, or the address is taken.
        FedsysError: A file is damaged, or the model cannot be converted.
    """
    from fedsys.commands.serve import live, opened, warn

    with ExitStack() as stack:
        own = ['serving.address="http://127.0.0.1:0"']
        folder = _served_folder(what, model, data, stack)
        if folder is not None:
            own.append(f"portfolio={_quoted(str(folder))}")
        tree = _composed(overrides, None, None, None, None, own)
        with configuration.as_given(overrides):
            config = configuration.parse(configuration.to_text(tree))
            it = stack.enter_context(opened(config))
            warn(it.endpoint, config)
            stack.enter_context(live(it, config))
        return ServedModel(stack.pop_all(), it)


def _served_folder(
    what: FinishedRun | Portfolio | Path | str | None, model: Any, data: Any, stack: ExitStack
) -> Path | None:
    """Return the portfolio that answers; one that has to be made is gone with the stack."""
    from fedsys.pruning.portfolio import Portfolio

    if (model is None) != (data is None) or (model is not None and what is not None):
        raise ConfigError.of(
            "model", model, "must come with data, and in place of a run or a portfolio",
            "fedsys.serve(model=my_model, data=my_images), or fedsys.serve(run)",
        )  # fmt: skip
    if isinstance(what, Portfolio):
        return what.folder
    path = what.path if isinstance(what, FinishedRun) else what
    if path is not None and not (Path(path) / "model.safetensors").is_file():
        return Path(path)
    if path is None and model is None:
        return None
    run = [] if path is None else [f"variants.run={_quoted(str(path))}"]
    measured = ("variants.memory=false", "variants.batch_sizes=[1,8]", "variants.threads=[1]")
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="fedsys-served-")))
    _one_variant(["+variants=portfolio", *run, *measured], model, data, folder)
    return folder


def _one_variant(own: Sequence[str], model: Any, data: Any, folder: Path) -> None:
    from fedsys.commands.prune import unpruned

    tree = _composed([], model, data, None, None, own)
    with configuration.as_given([]), extras_named():
        unpruned(tree, folder / "portfolio")


def load(path: Path | str) -> FinishedRun:
    """Return a finished run by its folder.

    Raises:
        ConfigError: There is no finished run.
    """
    from fedsys.runs.folder import RunFolder

    info = RunFolder.open(Path(path)).info
    if info["status"] != "finished":
        raise ConfigError.of(
            "path", path, f"must be the folder of a finished run, and this one is {info['status']}",
            f"fedsys.train('resume={path}') goes on",
        )  # fmt: skip
    return FinishedRun(Path(path), info["result"])


def called(
    job: Any,
    overrides: Sequence[str],
    model: Any = None,
    data: Any = None,
    loss: Any = None,
    metric: Any = None,
    more: Sequence[str] = (),
    told: Sequence[str] | None = None,
) -> Mapping[str, Any]:
    """Do what a command does with a composed configuration.

    Args:
        job: Of the command.
        overrides: What is asked for, as on the command line.
        model: As for `train`; likewise the three that follow.
        data: Likewise.
        loss: Likewise.
        metric: Likewise.
        more: Overrides that stand behind the name of the command.
        told: Those that a person gave, for commands that speak of them; None: all of `overrides`.
    """
    tree = _composed(overrides, model, data, loss, metric, more)
    with configuration.as_given(overrides if told is None else told), extras_named():
        figures: Mapping[str, Any] = job(tree)
    return figures


def _composed(
    overrides: Sequence[str], model: Any, data: Any, loss: Any, metric: Any, more: Sequence[str]
) -> Any:
    """Return what Hydra composes; arguments as for `called`.

    Raises:
        ConfigError: It cannot, or objects are to go where they cannot.
    """
    from fedsys.config.composing import composed

    for text in overrides:
        if not isinstance(text, str) or "=" not in text:
            raise ConfigError.of("overrides", repr(text), "must be texts such as 'rounds=20'")
    asked = [*more, *_given(model, data, loss, metric), *overrides]
    asked = [configuration.renamed(text) for text in asked]
    with configuration.translated_errors(), configuration.known_models(asked):
        tree = composed(asked)
    config = configuration.plain(tree)
    keys = objects.held_in({key: config[key] for key in ("model", "data", "task")})
    kind = config["runtime"]["kind"]
    if keys and (kind != "local" or config["fleet"].get("edges")):
        raise ConfigError.of(
            "runtime", kind, f"cannot be with {', '.join(keys)}, objects of this process alone",
            "put the class or function into a module that all processes can import, and give that",
        )  # fmt: skip
    return tree


def _given(model: Any, data: Any, loss: Any, metric: Any) -> list[str]:
    """Return the overrides that name what was given as objects."""
    made = []
    if model is not None:
        made += ["model=own", *_named("model", objects.target_of(model, "model"))]
    if data is not None:
        made += ["data=own", *_named("data", objects.target_of(data, "dataset"))]
    if loss is not None:
        made.append(f"task.loss={_text(objects.target_of(loss, 'function'))}")
    if metric is not None:
        name = getattr(metric, "__name__", type(metric).__name__)
        target = _text({**objects.target_of(metric, "function"), "name": name})
        if getattr(metric, "higher_is_better", None) is False:  # as those of torchmetrics say
            target = f"{target[:-1]},higher:false}}"
        made.append(f"task.metric={target}")
    return made


def _named(group: str, target: Mapping[str, Any]) -> list[str]:
    return [f"{'' if key == '_target_' else '+'}{group}.{key}={_quoted(value)}"
            for key, value in target.items()]  # fmt: skip


def _quoted(value: str) -> str:
    return json.dumps(value) if '"' in value else f'"{value}"'


def _text(target: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"{key}:{_quoted(value)}" for key, value in target.items()) + "}"
