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
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsys import config as configuration
from fedsys.config import Config, objects
from fedsys.config.task import Metric
from fedsys.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from fedsys.pruning.portfolio import Portfolio

Row = Mapping[str, float | str]


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


def train(
    *overrides: str, model: Any = None, data: Any = None, loss: Any = None, metric: Any = None
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
        metric: A function of (outputs, targets) that returns a number for each example.

    Raises:
        ConfigError: A value is not usable, or an object does not travel to where it is needed.
        FedsysError: The run failed.
    """
    from fedsys.commands import train as command

    figures = called(command.job, overrides, model, data, loss, metric)
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
    with configuration.as_given(overrides if told is None else told):
        figures: Mapping[str, Any] = job(tree)
    return figures


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
        made.append(f"task.metric={_text({**objects.target_of(metric, 'function'), 'name': name})}")
    return made


def _named(group: str, target: Mapping[str, Any]) -> list[str]:
    return [f"{'' if key == '_target_' else '+'}{group}.{key}={_quoted(value)}"
            for key, value in target.items()]  # fmt: skip


def _quoted(value: str) -> str:
    return json.dumps(value) if '"' in value else f'"{value}"'


def _text(target: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"{key}:{_quoted(value)}" for key, value in target.items()) + "}"
