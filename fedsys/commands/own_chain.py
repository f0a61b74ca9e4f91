"""What a chain lacks and ``fedsys serve`` makes itself: hosts on this machine, and a model.

Hosts of ``hosts.list`` with ``start: true`` are started as processes, at free ports of loopback,
and end with the process that serves. If such a chain names no portfolio, its model is trained as
the configuration says, pruned to a smaller variant, and kept in ``outputs/chains``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from fedsys import config as configuration
from fedsys.commands.host import start_host
from fedsys.config import Config
from fedsys.config.partition import HostConfig
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.pruning.portfolio import MANIFEST
from fedsys.transport.security import new_token

_TRAINS = ("data", "model", "client", "num_clients", "rounds", "seed", "resilience", "strategy")
"""Groups and keys that say what is trained."""

_SPARSITY = "pruning.sparsity=[0.5]"


@contextmanager
def started(config: Config) -> Iterator[tuple[Config, Mapping[str, int]]]:
    """Start hosts; yield the configuration with their addresses, and their process ids by name.

    They end with the context.

    Raises:
        ConfigError: A host that is to be started has an address.
        RuntimeFailure: One cannot be started.
    """
    token = config.hosts.control_token or new_token()
    with ExitStack() as stack, ThreadPoolExecutor(len(config.hosts.list)) as pool:
        for index, one in enumerate(config.hosts.list):
            if one.start and one.address:
                raise ConfigError.of(
                    f"hosts.list[{index}].address", one.address,
                    "must be empty for a host that is started: it gets a free port",
                )  # fmt: skip
            if not 1 <= one.slower <= 1000:
                rule = "must be from 1 to 1000"
                raise ConfigError.of(f"hosts.list[{index}].slower", one.slower, rule)
        begun = {
            one.name: pool.submit(start_host, _given(config, one), token)
            for one in config.hosts.list if one.start
        }  # fmt: skip
        places = {name: future.result() for name, future in begun.items()}
        for _, spawned in places.values():
            stack.callback(spawned.end)
        listed = tuple(
            replace(one, address=places[one.name][1].address, start=False) if one.start else one
            for one in config.hosts.list
        )
        hosts = replace(config.hosts, list=listed, control_token=token)
        yield replace(config, hosts=hosts), {name: pid for name, (pid, _) in places.items()}


def _given(config: Config, one: HostConfig) -> list[str]:
    given = [f"host.name={one.name}", "host.address=tcp://127.0.0.1:0"]
    given += [f"host.slower={one.slower}"] if one.slower != 1 else []
    threads = config.serving.threads
    return given if threads is None else [*given, f"host.threads={threads}"]


def made_model(config: Config, chosen: Sequence[str] | None = None) -> Config:
    """Return the configuration with a portfolio, and exits where they are trained.

    Args:
        config: What is trained.
        chosen: Overrides that compose the same; None: those of the command line.

    Raises:
        RuntimeFailure: It cannot be made; with the last words of what failed.
    """
    values = configuration.plain(config.text)
    about = {key: values.get(key) for key in _TRAINS}
    name = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
    folder = Path("outputs/chains") / name
    run, pruned = folder / "train", folder / "prune"
    named = configuration.given().items()
    given = list(chosen or ())
    if chosen is None:
        given = [text for key, text in named if key.split(".")[0] in ("experiment", *_TRAINS)]
    if not _is_finished(run):
        _say(f"training the model of the chain in {run}")
        anew = (*given, f"run.dir={run}", "run.plots=false")
        _carry_out("train", *((f"resume={run}",) if (run / "run.json").exists() else anew))
    if not (pruned / "portfolio" / MANIFEST).exists():  # written last
        shutil.rmtree(pruned, ignore_errors=True)
        _say(f"making a smaller variant in {pruned}")
        measured = ("variants.memory=false", "variants.threads=[1]", "variants.runs=30")
        whole = ("variants.fold_batchnorm=false", "variants.fine_tune=1", "run.plots=false")
        _carry_out("prune", f"run={run}", f"run.dir={pruned}", _SPARSITY, *measured, *whole)
    exits = str(run) if config.resilience.active else config.serving.exits
    serving = replace(config.serving, exits=exits)
    return replace(config, portfolio=str(pruned / "portfolio"), serving=serving)


def _is_finished(run: Path) -> bool:
    """Say whether a run came to its end; one that was interrupted is continued."""
    try:
        told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("status") == "finished"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _carry_out(*given: str) -> None:
    command = [sys.executable, "-m", "fedsys.main", *given, "json=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeFailure(f"fedsys {given[0]} failed: {last}")
