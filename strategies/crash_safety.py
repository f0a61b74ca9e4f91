"""Crash safety of a run: where it begins or continues, what is kept of each round, what fails.

Kept is what later rounds depend on: the global model, the state of server optimizers, the state
that is kept for clients. Draws need no keeping, as they are functions of their address.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.faults import Fault, Faults, struck_before
from fedsys.runs import resume
from fedsys.runs.checkpoint import Checkpoint, Checkpoints, StrategyState
from fedsys.runs.folder import RunFolder
from fedsys.runs.progress import Progress
from strategies.rounds import RoundResult


@dataclass
class CrashSafety:
    """The folder of a run, its checkpoints and its faults.

    Attributes:
        config: The run.
        folder: Where it is written.
        checkpoints: Held for as long as this process works on the run.
        last: What the run continues from; None for the beginning.
        faults: What is to strike.
    """

    config: Config
    folder: RunFolder
    checkpoints: Checkpoints
    last: Checkpoint | None
    faults: Faults

    @property
    def done(self) -> int:
        """Rounds that an interrupted run has behind it."""
        return self.last.round if self.last else 0

    @property
    def seconds(self) -> float:
        """Seconds that these took."""
        return self.last.seconds if self.last else 0.0

    def watch(self, strategy: Strategy, initial: ArrayRecord) -> ArrayRecord:
        """Put a strategy into the state of the checkpoint, and watch it from here on.

        Args:
            strategy: As it was built.
            initial: The model before the first round.

        Returns:
            The global model with which the next round begins.
        """
        self._state = StrategyState(strategy)
        if self.last is None:
            return initial
        self._state.put(self.last.strategy)
        return self.last.arrays

    def keep(self, result: RoundResult) -> None:
        """Write the checkpoint of a round, if it is due."""
        number = result.number
        self.faults.kill_server(number, "before_checkpoint")
        if number % self.config.checkpoint.every == 0 or number == self.config.rounds:
            checkpoint = Checkpoint(
                round=number,
                arrays=result.arrays,
                strategy=self._state.take(),
                seconds=float(result.row["seconds_elapsed"]),
                config_sha256=resume.digest(self.config),
            )
            self.checkpoints.write(
                checkpoint, halfway=lambda: self.faults.kill_server(number, "in_checkpoint")
            )
        self.faults.kill_server(number, "after_checkpoint")


@contextmanager
def opened(config: Config, path: Path, progress: Progress) -> Iterator[CrashSafety]:
    """Open the folder of a new run, or of the one that `config.resume` continues.

    Raises:
        ConfigError: The folder is another run's, or the checkpoint of another configuration.
        RunError: Another process is at work on the run, or no checkpoint is good.
    """
    if config.resume is None:
        with RunFolder.create(path, config.text) as folder, Checkpoints(path) as checkpoints:
            yield CrashSafety(config, folder, checkpoints, None, _faults(config, folder, 0))
        return
    resume.check_folder(path)
    with Checkpoints(path) as checkpoints:
        last = checkpoints.newest()
        done = last.round if last else 0
        _check(config, last, path)
        text = configuration.with_values(config.text, resume=None)
        with RunFolder.resume(path, done, text) as folder:
            for problem in folder.problems:
                progress.note(f"{problem}; continuing after round {done}")
            for problem in checkpoints.problems:
                folder.event("checkpoint_damaged", reason=problem, continued_after=done)
                progress.note(f"{problem}; continuing after round {done}")
            yield CrashSafety(config, folder, checkpoints, last, _faults(config, folder, done))


def _check(config: Config, last: Checkpoint | None, path: Path) -> None:
    if last is None:
        return
    if last.config_sha256 != resume.digest(config):
        rule = "must hold checkpoints of its own config.yaml; these are of another configuration"
        raise ConfigError.of("resume", path, rule, "restore that file, or start a new run")
    if config.rounds < last.round:
        rule = f"must be at least {last.round}, the rounds that the run has behind it"
        raise ConfigError.of("rounds", config.rounds, rule)


def _faults(config: Config, folder: RunFolder, done: int) -> Faults:
    def record(fault: Fault) -> None:
        folder.event("fault", fault=dataclasses.asdict(fault))

    planned = config.faults.list
    fired = struck_before(folder.events(), done)
    for index, fault in enumerate(planned):
        if fault.round <= done and fault not in fired:
            rule = f"must be above {done}, after which the run continues: it never strikes"
            name = f"faults.list[{index}].round"
            raise ConfigError.of(name, fault.round, rule, "faults=none takes all away")
    return Faults(planned, fired=fired, record=record)
