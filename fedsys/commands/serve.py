"""``fedsys serve``: answer requests by a portfolio or a chain of hosts, until it is told to stop.

When it is told to stop, it takes no more requests, finishes those in work, and says what it did. A
second signal ends it at once.
"""

from __future__ import annotations

import gc
import ipaddress
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.config.dashboard import address_of, check_token
from fedsys.config.secret import VARIABLE
from fedsys.errors import ConfigError
from fedsys.pruning.portfolio import Portfolio
from fedsys.runs.live.process import live_page
from fedsys.serving.engine import Engine
from fedsys.serving.http import Endpoint
from fedsys.serving.portfolio import PortfolioEngine, needs_torch
from fedsys.serving.switch.control import Record

SWITCH_S = 0.0005
"""How long a thread of Python keeps others waiting: 5 ms, the default, is the time of an answer."""


def job(tree: Any) -> Mapping[str, Any]:
    """Serve until the process is told to stop.

    Once it is ready, it prints its address; with ``json=true`` as an object ``{"ready": …}`` on a
    line of its own.

    Args:
        tree: The composed configuration (a DictConfig), of which ``portfolio`` and ``serving``
            count.

    Returns:
        What it did: ``answers`` by variant, ``switches``, ``failed_switches``, the last
        ``variant``, and whether it was expected to meet the objective; of a chain of hosts,
        ``answers`` by cuts, ``moves``, and the last cuts as ``variant``.

    Raises:
        ConfigError: No folder is named, or it is not there, or the address cannot be listened on.
        ModelError: The portfolio is damaged.
    """
    config = configuration.parse(configuration.to_text(tree))
    with opened(config) as it:
        # What is here now stays: a collection need not look at it, and so is short.
        gc.collect()
        gc.freeze()
        _say(it, config)
        with live(it, config):
            _until_told()
    return it.figures()


@dataclass(frozen=True)
class Opened:
    """An endpoint that answers.

    Attributes:
        endpoint: Where.
        engine: What computes.
        portfolio: Of what.
        told: What is told of it when it is ready.
        lines: The same in words.
        counted: Keys of its status that say what it did.
        processes: Ids of the processes of hosts that were started for it, by name.
    """

    endpoint: Endpoint
    engine: Engine
    portfolio: Portfolio
    told: Mapping[str, Any]
    lines: Sequence[str]
    counted: Sequence[str]
    processes: Mapping[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return what it did so far; in full when it is closed."""
        status = self.engine.status()
        return {key: status[key] for key in self.counted if key in status}


@contextmanager
def opened(config: Config) -> Iterator[Opened]:
    """Yield an endpoint as the configuration says; at the end, finish the requests in work.

    Raises:
        ConfigError: No folder is named, or it is not there, or the address cannot be listened on.
        ModelError: The portfolio is damaged.
    """
    if (page := address_of(config.dashboard)) is not None:
        check_token(page, os.environ.get(VARIABLE, "").strip())
    with ExitStack() as stack:
        processes: Mapping[str, int] = {}
        if config.hosts.to_start:
            from fedsys.commands.own_chain import made_model, started  # brings PyTorch

            config = made_model(config) if config.portfolio is None else config
            config, processes = stack.enter_context(started(config))
        portfolio = Portfolio.load(_folder(config))
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_S)
        if config.hosts.reachable:
            yield stack.enter_context(_chain(config, portfolio, processes))
        else:
            yield stack.enter_context(_portfolio(config, portfolio))


@contextmanager
def _portfolio(config: Config, portfolio: Portfolio) -> Iterator[Opened]:
    """Serve by a portfolio in this process."""
    with ExitStack() as stack:
        if config.serving.threads is not None and needs_torch(portfolio, config.serving):
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(config.serving.threads)
        engine = PortfolioEngine(
            portfolio, config.serving, lambda record: _tell(record, config.json)
        )
        with ExitStack() as failed:
            failed.callback(engine.close)
            endpoint = Endpoint(engine, config.serving)
            failed.pop_all()
        stack.callback(endpoint.close)
        engine.control.start(config.serving.interval_s)
        status = engine.status()
        line = f"{len(portfolio.variants)} variants; {status['variant']}: {status['reason']}"
        counted = ("answers", "switches", "failed_switches", "variant", "meets_objective")
        told = {"meets_objective": status["meets_objective"]}
        yield Opened(endpoint, engine, portfolio, told, [line], counted)


def _tell_move(record: Mapping[str, Any], as_json: bool) -> None:
    if "event" in record:
        _tell_event(record, as_json)
        return
    if as_json:
        text = json.dumps({"move": record})
    elif "error" in record:
        text = f"cuts {record['cuts']} could not be built, the old ones answer: {record['error']}"
    else:
        text = (
            f"cuts {record['cuts']} in {record['prepare_ms']:.0f} ms, {record['blocked_ms']:.3f} "
            f"ms without service: {record['reason']}"
        )
    print(text, file=sys.stderr, flush=True)


def _tell_event(record: Mapping[str, Any], as_json: bool) -> None:
    """Say what happened to a host of a chain, and what stands in for it."""
    if as_json:
        text = json.dumps({"recovery": record})
    else:
        what, host = record["event"], record.get("host") or "the chain"
        text = {
            "lost": "{host} is lost: {why}",
            "returned": "{host} is back",
            "leaves": "{host} is about to end: it is left out",
            "stays": "{host} stays",
            "nobody": "{reason}",
            "failover": "{technique} {route} stands in for {host}, decided in {decide_ms:.2f} ms, "
            "applied in {apply_ms:.1f} ms, {replayed} requests went on: {reason}",
            "prepares": "{route} is prepared",
            "switched": "{route} answers, built in {build_ms:.0f} ms",
            "applied": "{route} answers, {replayed} requests went on",
            "not_built": "{route} could not be built: {error}",
            "proved": "{route} takes {measured_ms:.1f} ms; expected were {predicted_ms:.1f}",
        }[what].format(**{**record, "host": host})
    print(text, file=sys.stderr, flush=True)


def _until_told() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("finishing the requests in work", file=sys.stderr)


@contextmanager
def _chain(config: Config, portfolio: Portfolio, processes: Mapping[str, int]) -> Iterator[Opened]:
    """Serve by a chain of hosts.

    Args:
        config: The configuration.
        portfolio: The model.
        processes: Ids of the processes of hosts that were started, by name.
    """
    from fedsys.serving.chain_opening import OpenedChain  # brings PyTorch

    chain = OpenedChain(config, portfolio, lambda record: _tell_move(record, config.json))
    with ExitStack() as failed:
        failed.callback(chain.close)
        endpoint = Endpoint(chain.engine, config.serving)
        failed.pop_all()
    with ExitStack() as stack:
        stack.callback(chain.release)
        stack.callback(endpoint.close)
        stack.callback(chain.settle)
        listed = chain.engine.status()["chain"]
        rows = [{**row, **_pid(row["host"], processes)} for row in listed]
        counted = ("answers", "moves", "variant", "technique", "failovers", "replayed")
        lines = [_of_host(row) for row in rows]
        told = {"chain": rows, "began_s": chain.began_s}
        yield Opened(endpoint, chain.engine, portfolio, told, lines, counted, processes)


@contextmanager
def live(it: Opened, config: Config) -> Iterator[None]:
    """Serve the live page of the endpoint as long as the block lasts, if there is to be one."""
    about = {
        "name": config.serving.name,
        "portfolio": str(it.portfolio.folder),
        "front": [
            {"name": v.name, "accuracy": v.accuracy, "p50_ms": v.p50_ms, "p95_ms": v.p95_ms}
            for v in it.portfolio.variants
        ],
        "processes": dict(it.processes),
        "objective_ms": config.serving.objective.p95_ms,
    }
    parts = urlsplit(it.endpoint.address)
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(str(parts.hostname))
    address = f"http://{here}:{parts.port}" if here else it.endpoint.address
    with live_page(config.dashboard, address, _say_live, about):
        yield


def _say_live(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _folder(config: Config) -> Path:
    if config.portfolio is None:
        raise ConfigError.of(
            "portfolio", None, "must name a folder of pruned variants",
            "make one by fedsys prune run=RUN, and give its folder as portfolio=DIR",
        )  # fmt: skip
    folder = Path(config.portfolio)
    if not folder.is_dir():
        rule = "must be a folder that exists"
        raise ConfigError.of("portfolio", folder, rule, "make one by fedsys prune run=RUN")
    return folder


def _pid(host: str, processes: Mapping[str, int]) -> dict[str, int]:
    return {"pid": processes[host]} if host in processes else {}


def _of_host(row: Mapping[str, Any]) -> str:
    names = row["units"]
    units = f"{names[0]} … {names[-1]}" if names else "nothing"
    process = f" (process {row['pid']})" if "pid" in row else ""
    return f"{row['host']} at {row['address']}{process}: {units}"


def _say(it: Opened, config: Config) -> None:
    """Tell that the endpoint is ready."""
    endpoint = it.endpoint
    if config.json:
        ready = {
            "address": endpoint.address,
            "grpc": endpoint.grpc_address,
            "model": config.serving.name,
            "variant": it.engine.status()["variant"],
            "pid": os.getpid(),
            **it.told,
        }
        print(json.dumps({"ready": ready}), flush=True)
    else:
        also = f" and {endpoint.grpc_address}" if endpoint.grpc_address else ""
        print(f"{endpoint.address}{also} answers for {config.serving.name}", flush=True)
        for line in it.lines:
            print(line, flush=True)
    warn(endpoint, config)


def warn(endpoint: Endpoint, config: Config) -> None:
    """Say on standard error what may be wrong with an endpoint, and who can reach it."""
    if endpoint.places < config.serving.max_connections:
        print(
            f"warning: the system allows descriptors for {endpoint.places} connections, not for "
            f"serving.max_connections={config.serving.max_connections}; ulimit -Hn is the limit",
            file=sys.stderr,
        )
    if not _is_loopback(endpoint.address):
        print(
            "warning: it can be reached from other machines, by plain HTTP and without asking who "
            "it is; docs/trust.md says what that means", file=sys.stderr,
        )  # fmt: skip


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tell(record: Record, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"switch": record.as_row()}, default=str), file=sys.stderr, flush=True)
        return
    row = record.decision
    if record.cost is None:
        text = f"{row.after} could not be loaded, {row.before} answers on: {record.error}"
    else:
        text = (
            f"{row.before} → {row.after} in {record.cost.total_ms:.0f} ms, "
            f"{record.cost.blocked_ms:.3f} ms without service: {row.reason}"
        )
    print(text, file=sys.stderr, flush=True)
