"""What the stages of a life have in common: their configuration, and results that are kept.

Each stage is done by the job of a command, with the overrides of the benchmark and its own. What
it found is written down when it is done, beside what the command left::

    KEPT/train.json  train/      the result of the stage, and the run folder of its command
    KEPT/prune.json  prune/ …

A stage whose result is there is not done again; a training that was interrupted is continued.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from fedsys import config as configuration
from fedsys.commands.bench import given_options, plain
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.files import json_text, write_atomic

BASE = "+experiment=lifecycle"
"""What is the same in all commands (``conf/experiment/lifecycle.yaml``)."""

STAGES = ("train", "prune", "partition", "switch", "chain")
"""In their order: each needs those before it, but ``switch``, which nobody needs."""

_OWN = ("bench", "json", "run.dir")  # groups and keys that count for no stage
_QUICK: Mapping[str, Any] = {
    "phase_s": 6.0,
    "switch_s": 6.0,
    "prune": [
        "pruning.sparsity=[0.5]", "variants.fine_tune=0", "variants.recalibrate=0",
        "variants.memory=false", "variants.threads=[1]", "variants.batch_sizes=[1]",
    ],
}  # fmt: skip

Found = Mapping[str, Any]


@dataclass(frozen=True)
class LifeDecision:
    """One decision of a life, and what it came to.

    Attributes:
        stage: One of `STAGES`.
        when: The round, phase, or moment.
        who: What was decided about: a device, a host, a model.
        decision: What was decided.
        why: The reason, as the program gave it.
        quantity: What was predicted and measured, with its unit; empty for neither.
        predicted: What was expected; None: nothing was.
        measured: What came; None: it was not seen.
    """

    stage: str
    when: str
    who: str
    decision: str
    why: str
    quantity: str = ""
    predicted: float | None = None
    measured: float | None = None

    def row(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        return dataclasses.asdict(self)


def overrides_of(given: Mapping[str, str], smaller: Sequence[str]) -> list[str]:
    """Return the overrides that compose the configuration of all stages.

    Args:
        given: What the command line says, by key.
        smaller: What makes it smaller, unless the command line says otherwise.

    >>> overrides_of({"bench.quick": "…", "rounds": "rounds=9"}, ["rounds=3", "seed=1"])
    ['+experiment=lifecycle', 'seed=1', 'rounds=9']
    """
    own = {k: text for k, text in given.items() if k not in _OWN and not k.startswith("bench.")}
    fewer = [text for text in smaller if text.partition("=")[0] not in own]
    return [BASE, *fewer, *own.values()]


def options_for(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the benchmark; with ``quick``, smaller ones where none are given."""
    given = given_options("lifecycle", options)
    more = {k: v for k, v in _QUICK.items() if k not in given} if options["quick"] else {}
    return {**options, **more}


@final
class Life:
    """The stages of one life, and where they are kept.

    Args:
        folder: Where; made if it is not there.
        options: Of the benchmark.
        given: What the command line says, by key.
        as_json: Whether the commands are to print no progress.

    Attributes:
        config: Of all stages.
        options: Of the benchmark.
        overrides: That compose it, for commands.

    Raises:
        ConfigError: A stage is unknown, or another life is kept in the folder.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, Any], given: Mapping[str, str], as_json: bool
    ) -> None:
        self.folder, self.options = folder, options_for(options)
        stages = [str(stage) for stage in options["stages"]]
        if not stages or not set(stages) <= set(STAGES):
            rule = f"must name at least one of {', '.join(STAGES)}"
            raise ConfigError.of("bench.stages", stages, rule)
        self.stages = [stage for stage in STAGES if stage in stages]
        smaller = [str(text) for text in options["smaller"]] if options["quick"] else []
        self.overrides = [*overrides_of(given, smaller), f"json={str(as_json).lower()}"]
        self.config: Config = configuration.parse(
            configuration.compose_text(shlex.join(self.overrides))
        )
        self._of = _digest(self.config, self.options)
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, stage: str) -> Found | None:
        """Return the result of a stage; None if it has none.

        Raises:
            ConfigError: It is of another configuration, or damaged.
        """
        file = self.folder / f"{stage}.json"
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            same = found.pop("of") == self._of
        except (ValueError, KeyError, AttributeError) as error:
            rule = f"must hold whole results, and {file.name} is damaged"
            raise ConfigError.of("bench.kept", self.folder, rule, f"remove {file}") from error
        if not same:
            rule = f"must be of the same configuration, and {file.name} is not"
            raise ConfigError.of("bench.kept", self.folder, rule, "give another folder")
        return found

    def needed(self, stage: str) -> Found:
        """Return the result of a stage that another one needs.

        Raises:
            ConfigError: It has none.
        """
        found = self.kept(stage)
        if found is None:
            rule, way_out = f"must have {stage} before what needs it", "or give bench.kept=FOLDER"
            raise ConfigError.of("bench.stages", self.stages, rule, way_out)
        return found

    def carried_out(self, stage: str, work: Callable[[Life], Found]) -> Found:
        """Return the result of a stage, which is done now if it is not kept."""
        found = self.kept(stage)
        if found is not None:
            say(f"{stage}: as it is kept in {self.folder}")
            return found
        say(f"{stage}: begins")
        began = time.monotonic()
        found = {"stage": stage, **work(self)}
        found["seconds"] = round(time.monotonic() - began, 3)
        text = json_text({"of": self._of, **found})
        write_atomic(self.folder / f"{stage}.json", text.encode())
        say(f"{stage}: {found['seconds']:.1f} s")
        return found


def _digest(config: Config, options: Mapping[str, Any]) -> str:
    """Return a digest of what results depend on."""
    values = configuration.plain(config.text)
    left = {k: v for k, v in values.items() if k not in ("bench", "json", "run", "resume")}
    told = {k: plain(v) for k, v in options.items() if k not in ("stages", "kept", "kill", "dies")}
    text = json.dumps([left, told], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def say(text: str) -> None:
    """Say how far it is."""
    print(f"lifecycle: {text}", file=sys.stderr, flush=True)
