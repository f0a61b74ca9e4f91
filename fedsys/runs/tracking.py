"""A run in the tracker that its user works with, beside the run folder, which stays the truth.

A `Tracker` has three methods, and everything that it is told: the configuration without secrets,
the numbers of each round under the names that TensorBoard shows, the figures, pictures and model
at the end. ``tracker._target_`` names its class, one of `fedsys.runs.trackers` or the user's own::

    class Lines:
        def start(self, run):
            self.file = open(run.folder / "lines.txt", "a")

        def log(self, number, scalars):
            print(number, scalars["accuracy/val"], file=self.file, flush=True)

        def finish(self, end):
            print(end.status, end.figures["result/accuracy"], file=self.file)
            self.file.close()

A tracker changes nothing of the run. It works in a thread of its own, so no round waits for it;
what it fails at is said once, and the run goes on; at the end it is waited for, for a bounded time.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from fedsys.config import Spec, call_target, public_text
from fedsys.errors import ConfigError, first_line, is_number
from fedsys.runs import plain_yaml
from fedsys.runs.folder import RunFolder
from fedsys.runs.scalars import numbers_of

__all__ = ["WAIT_S", "End", "TrackedRun", "Tracker", "Tracking", "built", "flat", "tracked"]

logger = logging.getLogger("fedsys")

WAIT_S: Final = 60.0
"""Seconds that a tracker is waited for at the end of a run, unless ``tracker.wait_s`` says more."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when a run begins or continues.

    Attributes:
        name: That of the run's folder.
        identity: The same when the run continues, and no other run's.
        folder: The run's folder.
        config: The composed configuration as nested dicts and lists, without secrets.
        after_round: Rounds that the run has behind it; 0 for a new one.
    """

    name: str
    identity: str
    folder: Path
    config: Mapping[str, Any]
    after_round: int

    @property
    def config_yaml(self) -> str:
        """The configuration as YAML."""
        import yaml

        return str(yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class End:
    """What a tracker is told when a run ends.

    Attributes:
        status: ``finished``, ``failed`` or ``interrupted``.
        last_round: The last round that was logged; 0 for none.
        figures: The numbers of ``run.json`` by name behind ``result/``; empty unless finished.
        plots: The pictures, in order of their names.
        model: The trained model; None if there is none.
    """

    status: str
    last_round: int
    figures: Mapping[str, float]
    plots: tuple[Path, ...]
    model: Path | None


class Tracker(Protocol):
    """Where a run is shown. Each method is called by one thread, in the order of the run."""

    def start(self, run: TrackedRun) -> None:
        """Begin a run, or take it up again; called once, first."""

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of round `number` (from 1) by their tags, as TensorBoard has them."""

    def finish(self, end: End) -> None:
        """End the run; called once, last."""


def built(spec: Spec) -> Tracker | None:
    """Return the tracker that the group ``tracker`` names; None for none.

    Raises:
        ConfigError: Its target is none, or refuses its options.
        ModelError: Its package is not installed; the message names the extra.
    """
    if not spec.get("_target_"):
        return None
    options = {key: value for key, value in spec.items() if key not in ("kind", "wait_s")}
    made = call_target(options, "tracker")
    missing = [n for n in ("start", "log", "finish") if not callable(getattr(made, n, None))]
    if missing:
        rule = f"must build a tracker; it has no method {', '.join(missing)}"
        raise ConfigError.of("tracker._target_", spec["_target_"], rule)
    return made  # type: ignore[no-any-return]


class Tracking:
    """Hands a run to a tracker in a thread of its own, and survives whatever that does.

    Args:
        tracker: Whom to tell.
        run: The run.
        say: Told once if the tracker fails.
        wait_s: Longest wait for it at the end, in seconds.
    """

    def __init__(
        self, tracker: Tracker, run: TrackedRun, say: Callable[[str], None], wait_s: float = WAIT_S
    ) -> None:
        self._tracker, self._say, self._wait_s = tracker, say, wait_s
        self._last = run.after_round
        self._told = self._started = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()
        self._calls.put(lambda: self._start(run))

    def log(self, row: Mapping[str, Any]) -> None:
        """Hand on a row of ``metrics.csv``; returns at once."""
        number, scalars = int(row["round"]), numbers_of(row)
        self._last = number
        self._calls.put(lambda: self._log(number, scalars))

    def finish(self, folder: Path, status: str, result: Mapping[str, Any]) -> None:
        """Hand on how the run ended, and wait until the tracker has it, or for `wait_s` at most."""
        model, figures = folder / "model.safetensors", flat({"result": dict(result)})
        end = End(
            status,
            self._last,
            {k: float(v) for k, v in figures.items() if is_number(v)},
            tuple(sorted((folder / "plots").glob("*.png"))),
            model if model.is_file() else None,
        )
        self._calls.put(lambda: self._finish(end))
        self._calls.put(None)
        self._thread.join(self._wait_s)
        if self._thread.is_alive():
            self._fail(f"is still at work after {self._wait_s:g} s and is left behind")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # also SystemExit: it is the tracker's, not the run's
                self._fail(f"failed: {type(error).__name__}: {first_line(error)}")

    def _start(self, run: TrackedRun) -> None:
        self._tracker.start(run)
        self._started = True

    def _log(self, number: int, scalars: Mapping[str, float]) -> None:
        if self._started:
            self._tracker.log(number, scalars)

    def _finish(self, end: End) -> None:
        if self._started:
            self._tracker.finish(end)

    def _fail(self, what: str) -> None:
        """Say the first failure to whoever sees the run; the log has all of them."""
        text = f"the tracker {type(self._tracker).__name__} {what}; the run goes on without it"
        if self._told:
            logger.info("%s", text)
            return
        self._told = True
        self._say(text)


@contextmanager
def tracked(
    spec: Spec, config_yaml: str, folder: RunFolder, after_round: int, say: Callable[[str], None]
) -> Iterator[None]:
    """Show a run in the tracker that ``tracker`` names, as long as the block lasts.

    Args:
        spec: The group ``tracker``.
        config_yaml: The configuration of the run.
        folder: Its folder; each round that it gets is handed on.
        after_round: Rounds that it has behind it.
        say: Told once if the tracker fails.

    Raises:
        ConfigError: The tracker cannot be built.
        ModelError: Its package is not installed.
    """
    tracker = built(spec)
    if tracker is None:
        yield
        return
    run = _run_of(folder, config_yaml, after_round)
    tracking = Tracking(tracker, run, say, float(spec.get("wait_s", WAIT_S)))
    folder.follow(tracking.log)
    try:
        yield
    except BaseException as error:
        folder.fail(error)
        raise
    finally:
        info = folder.info
        tracking.finish(folder.path, str(info["status"]), info.get("result") or {})


def _run_of(folder: RunFolder, config_yaml: str, after_round: int) -> TrackedRun:
    path = folder.path.absolute()
    identity = hashlib.sha256(f"{path.name} {folder.info.get('started')}".encode()).hexdigest()[:16]
    config = plain_yaml.load(public_text(config_yaml)) or {}
    return TrackedRun(path.name, identity, path, config, after_round)


def flat(tree: Mapping[str, Any], joint: str = "/") -> dict[str, Any]:
    """Return the leaves of nested dicts by the path to them; lists are leaves.

    >>> flat({"client": {"lr": 0.1}, "seed": 0}, ".")
    {'client.lr': 0.1, 'seed': 0}
    """
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            inner = flat(value, joint).items()
            leaves |= {f"{key}{joint}{name}": leaf for name, leaf in inner}
        else:
            leaves[str(key)] = value
    return leaves
