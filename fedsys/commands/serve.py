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
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.config.dashboard import address_of, check_token
from fedsys.config.secret import VARIABLE
from fedsys.errors import ConfigError
from fedsys.pruning.portfolio import Portfolio
from fedsys.runs.live.process import live_page
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
        ``variant``, and whether it was expected to meet the objective; where ``hosts.list`` has
        addresses, what `_serve_chain` returns.

    Raises:
        ConfigError: No folder is named, or it is not there, or the address cannot be listened on.
        ModelError: The portfolio is damaged.
    """
    config = configuration.parse(configuration.to_text(tree))
    if (page := address_of(config.dashboard)) is not None:
        check_token(page, os.environ.get(VARIABLE, "").strip())
    if config.hosts.to_start:
        return _start_chain(config)
    portfolio = Portfolio.load(_folder(config))
    sys.setswitchinterval(SWITCH_S)
    if config.hosts.reachable:
        return _serve_chain(config, portfolio)
    if config.serving.threads is not None and needs_torch(portfolio, config.serving):
        import torch

        torch.set_num_threads(config.serving.threads)
    engine = PortfolioEngine(portfolio, config.serving, lambda record: _tell(record, config.json))
    try:
        endpoint = Endpoint(engine, config.serving)
    except BaseException:
        engine.close()
        raise
    engine.control.start(config.serving.interval_s)
    # What is here now stays: a collection need not look at it, and so is short.
    gc.collect()
    gc.freeze()
    status = engine.status()
    line = f"{len(portfolio.variants)} variants; {status['variant']}: {status['reason']}"
    _say(endpoint, config, status, "meets_objective", [line])
    with _live(endpoint, config, portfolio):
        _until_told()
    endpoint.close()
    status = engine.status()
    keys = ("answers", "switches", "failed_switches", "variant", "meets_objective")
    return {key: status[key] for key in keys}


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
def _live(
    endpoint: Endpoint,
    config: Config,
    portfolio: Portfolio,
    processes: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[None]:
    """Serve the live page of the endpoint as long as the block lasts, if there is to be one."""
    about = {
        "name": config.serving.name,
        "portfolio": str(portfolio.folder),
        "front": [
            {"name": v.name, "accuracy": v.accuracy, "p50_ms": v.p50_ms, "p95_ms": v.p95_ms}
            for v in portfolio.variants
        ],
        "processes": dict(processes),
        "objective_ms": config.serving.objective.p95_ms,
    }
    parts = urlsplit(endpoint.address)
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(str(parts.hostname))
    address = f"http://{here}:{parts.port}" if here else endpoint.address
    with live_page(config.dashboard, address, _say_live, about):
        yield


def _say_live(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _start_chain(config: Config) -> Mapping[str, Any]:
    """Serve by hosts that are started for it."""
    from fedsys.commands.own_chain import made_model, started  # brings PyTorch

    config = made_model(config) if config.portfolio is None else config
    with started(config) as (own, processes):
        sys.setswitchinterval(SWITCH_S)
        return _serve_chain(own, Portfolio.load(_folder(own)), processes)


def _serve_chain(
    config: Config, portfolio: Portfolio, processes: Mapping[str, int] = MappingProxyType({})
) -> Mapping[str, Any]:
    """Serve by a chain of hosts.

    Args:
        config: The configuration.
        portfolio: The model.
        processes: Ids of the processes of hosts that were started, by name.

    Returns:
        What it did: ``answers`` by cuts, ``moves``, and the last cuts as ``variant``.
    """
    from fedsys.serving.chain_opening import OpenedChain  # brings PyTorch

    opened = OpenedChain(config, portfolio, lambda record: _tell_move(record, config.json))
    engine = opened.engine
    try:
        endpoint = Endpoint(engine, config.serving)
    except BaseException:
        opened.close()
        raise
    status = engine.status()
    rows = [{**row, **_pid(row["host"], processes)} for row in status["chain"]]
    status, lines = {**status, "chain": rows}, [_of_host(row) for row in rows]
    more = {"began_s": opened.began_s}
    _say(endpoint, config, status, "chain", lines, more)
    with _live(endpoint, config, portfolio, processes):
        _until_told()
    opened.settle()
    endpoint.close()
    opened.release()
    status = engine.status()
    keys = ("answers", "moves", "variant", "technique", "failovers", "replayed")
    return {key: status[key] for key in keys if key in status}


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


def _say(
    endpoint: Endpoint,
    config: Config,
    status: Mapping[str, Any],
    key: str,
    lines: Sequence[str],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Tell that the endpoint is ready, with one more value of its status, or with these lines."""
    if config.json:
        ready = {
            "address": endpoint.address,
            "grpc": endpoint.grpc_address,
            "model": config.serving.name,
            "variant": status["variant"],
            key: status[key],
            "pid": os.getpid(),
            **more,
        }
        print(json.dumps({"ready": ready}), flush=True)
    else:
        also = f" and {endpoint.grpc_address}" if endpoint.grpc_address else ""
        print(f"{endpoint.address}{also} answers for {config.serving.name}", flush=True)
        for line in lines:
            print(line, flush=True)
    _warn(endpoint, config)


def _warn(endpoint: Endpoint, config: Config) -> None:
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
