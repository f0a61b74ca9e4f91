"""The runtime ``deployment``: Flower's SuperLink and SuperNodes, on one machine or on several.

The run is submitted as ``flwr run`` does it and then followed: progress, result and errors come
back with what the server app prints, so that the SuperLink may be on any machine. The run folder
is on the machine of the server app.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from fedsys import config as configuration
from fedsys.config import Config, secret
from fedsys.errors import ConfigError, RunError, RuntimeFailure
from fedsys.runs import startup as stages
from fedsys.runs.folder import RunFolder, check_free
from fedsys.runs.progress import Progress, choose
from fedsys.runtime import bundle
from fedsys.runtime.control import SuperLinkAddress, SuperLinkClient
from fedsys.runtime.edge_processes import check_reachable
from fedsys.runtime.launch import Launched, launched
from fedsys.runtime.relay import Replay
from fedsys.runtime.server_side import Restarted


def run_deployment(config: Config) -> Mapping[str, Any]:
    """Submit the run to a SuperLink, which is started first if the run asks for that.

    Returns:
        The result, in which ``run_dir`` is a folder of the machine of the server app.

    Raises:
        ConfigError: The run does not say which SuperLink.
        RuntimeFailure: The SuperLink, a node or a process failed.
        FedsysError: Whatever made the run fail.
    """
    runtime = config.runtime
    with choose(json=config.json) as progress:
        if runtime.launch:
            token = secret.handed_on(config.fleet.control_token)
            with (
                _settled(config), _with_way_on(config), token, launched(config, progress) as here
            ):  # fmt: skip
                told = _carry_through(config, here, progress)
            result = {**told, **stages.current().figures()}
            RunFolder.open(Path(str(config.run.dir))).finish(result)  # with the time of the command
            return result
        if runtime.superlink is None:
            raise ConfigError.of(
                "runtime.superlink",
                None,
                "must name the SuperLink as host:port",
                "or start one here with runtime.launch=true",
            )
        check_reachable(config, runtime.superlink)
        _check_token(config)
        address = SuperLinkAddress.of(
            runtime.superlink, runtime.root_certificates, runtime.insecure
        )
        with _with_way_on(config):
            told = _carry_out(config, Launched(address, lambda: None, {}), progress)
        return {**told, **stages.current().figures()}


SUBMISSIONS = 4
"""How many times a run is submitted to a SuperLink that was started for it."""


_FLOWERS = (
    # Without its token, Flower interrupts the server app, and answers that the run does not run.
    *("KeyboardInterrupt", "SystemExit", "RunNotRunningException"),
    # A SuperLink that was started again has not what was being pushed to it.
    *("ObjectPushError", "ObjectPullError", "ObjectUnavailableError", "NoObjectInStoreError"),
)
"""Errors of a server app that are not its own, by their names."""


class Stopped(RuntimeFailure):
    """A run was stopped from outside."""


class Unfinished(RuntimeFailure):
    """A run ended before its last round, and its server app did not say why."""


def _carry_through(config: Config, here: Launched, progress: Progress) -> Mapping[str, Any]:
    """Carry out a run, and go on with it where it was Flower that ended it.

    A SuperLink on a machine that is short of time answers too late: its database is locked, the
    session in which objects are pushed expires, or the token of the server app does, whose
    heartbeats come late. Or the process of the server app was killed, alone or with what runs it.
    No round that has a checkpoint is lost by that.
    """
    for _ in range(SUBMISSIONS - 1):
        try:
            return _carry_out(config, here, progress)
        except (Unfinished, Restarted) as error:
            if not _ended_by_flower(Path(str(config.run.dir))):
                raise
            progress.note(f"{error}; it is submitted again")
            config = _continued(config)
    return _carry_out(config, here, progress)


def _ended_by_flower(path: Path) -> bool:
    """Return whether a run ended as requests to the SuperLink failed, by what its folder says."""
    if not (path / "run.json").is_file():  # before its server app came so far
        return True
    try:
        info = RunFolder.open(path).info
    except RunError:
        return False
    if info.get("status") == "running":  # its process was killed, and said nothing
        return True
    told = info.get("error")
    kind = str(told.get("type")) if isinstance(told, Mapping) else ""
    of_httpx = getattr(httpx, kind, None)
    failed = isinstance(of_httpx, type) and issubclass(of_httpx, httpx.HTTPError)
    return failed or kind in _FLOWERS


def _continued(config: Config) -> Config:
    """Return the configuration with which a run goes on, if it has begun."""
    path = Path(str(config.run.dir))
    if not (path / "run.json").is_file():
        return config
    return configuration.parse(configuration.with_values(config.text, resume=str(path)))


def _check_token(config: Config) -> None:
    """Refuse a token that could only reach the server app in what every device is told.

    Raises:
        ConfigError: The command line holds it.
    """
    if config.fleet.control_token not in ("", secret.MASK):
        raise ConfigError.of(
            "fleet.control_token", secret.MASK,
            "must not be sent to a SuperLink, which tells all devices",
            "name a file on the machine of the server app, fleet.control_token_file=FILE, or set "
            f"{secret.VARIABLE} for its executor",
        )  # fmt: skip


@contextmanager
def _settled(config: Config) -> Iterator[None]:
    """See to it that the folder of a launched run says how the run ended.

    Its server app is a process, which may end without a word.

    Raises:
        ConfigError: The folder is another run's.
    """
    path = Path(str(config.run.dir))
    if config.resume is None:
        check_free(path)
    try:
        yield
    except BaseException as error:
        with suppress(RunError):  # no run, or one that another process is at work on
            folder = RunFolder.open(path)
            if folder.info["status"] == "running":
                from fedsys.runs.checkpoint import (
                    Checkpoints,  # imports torch, which nothing else needs
                )

                with Checkpoints(path):
                    folder.fail(error)
        raise


def _carry_out(config: Config, there: Launched, progress: Progress) -> Mapping[str, Any]:
    """Submit the run, show how it goes, and return its result or raise what made it fail."""
    content, sha256 = bundle.build()
    replay = Replay(progress)
    told = {"hydra-config": config.text, "progress": "relayed", **there.run_config}
    with SuperLinkClient(there.address) as control:
        run_id = control.submit(content, sha256, told)
        progress.phase("starting the server app")
        try:
            ended, details = control.follow(
                run_id,
                replay.feed,
                patience_s=config.runtime.wait_s,
                outage=progress.note,
                check=there.check,
            )
        except BaseException:
            _stop(control, run_id)
            raise
    if replay.error is not None:
        raise replay.error
    if ended != "completed" or replay.result is None:
        kind = Stopped if ended == "stopped" else Unfinished
        raise kind(f"run {run_id} ended as {ended}: {details or 'the server app said nothing'}")
    progress.finish(replay.result)
    return replay.result


@contextmanager
def _with_way_on(config: Config) -> Iterator[None]:
    """Have an error with which a run ends before its last round say how it goes on."""
    try:
        yield
    except (Unfinished, Stopped, Restarted) as error:
        where = "" if config.runtime.launch else " on the machine of the server app"
        run = config.run.dir if config.runtime.launch else "RUN"
        raise type(error)(f"{error}; fedsys train resume={run}{where} continues it") from error


def _stop(control: SuperLinkClient, run_id: int) -> None:
    """Stop a run that nobody waits for any more; what stands in the way is said, not raised."""
    try:
        control.stop(run_id)
    except RuntimeFailure as error:
        print(f"warning: run {run_id} may still go on: {error}", file=sys.stderr)
