"""A device moves between edge servers in the middle of a round: what that takes, and what it saves.

Edge servers are processes of their own, ``fedsys edge``, whose links to each other are slowed down
to a rate; devices are threads of this process, with links as fast as they are. The rival begins the
mover's round anew where it arrives, as SplitFed without migration does: of a round with a move
after a share p, FedFly's saving is at most p / (1 + p).

A schedule of faults is a run with moves at random points and with an edge server that is killed or
links that are cut, slowed down or corrupted around them, all drawn from its number. It must end
with the model of the run without any of that, or say whom it left out.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.commands.bench.rounds import EdgeProcess, Watching, edge_process
from fedsys.config import Config
from fedsys.errors import FedsysError, RuntimeFailure
from fedsys.faults import AT_EDGE
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import play_local
from fedsys.transport.security import new_token

MOVER: Final = 0
MODEL: Final = "model.safetensors"
_KINDS: Final = ("edge_killed", "link_cut", "link_slow", "link_corrupted", "link_duplicated")


@dataclass(frozen=True)
class MeasuredRun:
    """A run that was carried out.

    Attributes:
        result: Of the run.
        mover_s: Seconds that the mover trained.
        state: The model.
        lost: Clients that were left out of a round, as its events say.
    """

    result: Mapping[str, Any]
    mover_s: float
    state: Mapping[str, Any]
    lost: int


class Runs:
    """Carries runs out on the same edge servers.

    Args:
        config: What they have in common.
        folder: Where they leave what they leave, for a moment.
        edges: The edge servers; none: each run has its own, as threads.
    """

    def __init__(self, config: Config, folder: Path, edges: Sequence[EdgeProcess] = ()) -> None:
        self._config, self._folder, self._edges = config, folder, edges

    def carry_out(self, **values: Any) -> MeasuredRun:
        """Carry a run out with more of the configuration, by group.

        Raises:
            FedsysError: The run failed.
        """
        fleet = dict(values.pop("fleet", {}))
        if self._edges:
            fleet["edges"] = [{"name": e.name, "address": e.address} for e in self._edges]
            fleet["control_token"] = self._edges[0].token
        path = self._folder / "run"
        given = {
            "json": True,
            "run": {"dir": str(path), "plots": False},
            "runtime": {"kind": "local", "workers": self._config.num_clients},
            "fleet": fleet,
        }
        text = configuration.with_values(self._config.text, **given, **values)
        made = configuration.parse(text)
        try:
            server, client = load_apps(made)
            watching = Watching(client)
            play_local(made, server, watching)
            result = json.loads((path / "run.json").read_text(encoding="utf-8"))["result"]
            seen = watching.watch.observations.get(MOVER)
            events = path / "events.jsonl"
            told = events.read_text(encoding="utf-8") if events.exists() else ""
            lost = told.count('"client_lost"')
            mover_s = seen.seconds if seen else 0.0
            return MeasuredRun(result, mover_s, load_file(path / MODEL), lost)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures; see the module.

    Args:
        config: The runs.
        options: ``move_at``, ``shares``, ``links_mbit_s``, ``hows``, ``moves``, ``schedules``.

    Returns:
        ``cases``, ``max_abs_diff`` over all of them and over runs with ``moves`` moves, and what
        became of the ``schedules``.
    """
    folder = Path(str(config.run.dir)) / "migration"
    folder.mkdir()
    token = new_token()
    with ExitStack() as stack:
        edges = [
            stack.enter_context(edge_process(name=f"edge-{i}", token=token))
            for i in range(config.num_edges)
        ]
        runs = Runs(config, folder, edges)
        runs.carry_out(mobility=_stays())  # what is imported and made once
        cases = list(_cases(runs, config, options))
        apart = [case["max_abs_diff"] for case in cases] + list(_moved_often(runs, options))
    figures = {"cases": cases, "max_abs_diff": max(apart, default=0.0)}
    return {**figures, **_schedules(config, folder, int(options["schedules"]))}


def _cases(runs: Runs, config: Config, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for share in options["shares"]:
        data = _data(float(share), config.num_clients)
        still = runs.carry_out(data=data, mobility=_stays())
        for at in options["move_at"]:
            restart = runs.carry_out(
                data=data,
                mobility=_moves([at], "announced", "restart"),
                network={"emulate": True},  # both have the same threads about their links
            )
            for rate, how in product(options["links_mbit_s"], options["hows"]):
                moved = runs.carry_out(
                    data=data,
                    mobility=_moves([at], how),
                    fleet={"between": {"mbit_s": float(rate)}},
                    network={"emulate": True},
                )
                yield _case(float(at), float(share), float(rate), str(how), still, restart, moved)


def _case(
    at: float,
    share: float,
    rate: float,
    how: str,
    still: MeasuredRun,
    restart: MeasuredRun,
    moved: MeasuredRun,
) -> dict[str, Any]:
    """Return the figures of one move.

    Raises:
        RuntimeFailure: The device did not move.
    """
    if not moved.result["moves"]:
        raise RuntimeFailure("bench migration: the device did not move")
    told = moved.result["moves"][0]
    on_the_wire = 8 * told["bytes"] / (1e6 * rate)
    return {
        "move_at": at,
        "share": share,
        "link_mbit_s": rate,
        "how": how,
        "saved": 1 - moved.mover_s / restart.mover_s if restart.mover_s else float("nan"),
        "at_most": at / (1 + at),
        "pause_s": told["pause_s"],
        "predicted_pause_s": on_the_wire,
        "goal_s": 1.25 * on_the_wire + 0.05,
        "bytes": told["bytes"],
        "precopied_bytes": told["precopied_bytes"],
        "parts_s": dict(told["parts_s"]),
        "max_abs_diff": _apart(still, moved),
    }


def _moved_often(runs: Runs, options: Mapping[str, Any]) -> Iterator[float]:
    still = runs.carry_out(mobility=_stays())
    for count in options["moves"]:
        at = [(i + 0.5) / int(count) for i in range(int(count))]
        moved = runs.carry_out(mobility=_moves(at, "announced"))
        yield _apart(still, moved)


def _apart(a: MeasuredRun, b: MeasuredRun) -> float:
    """Return the largest difference of two numbers of two models."""
    return max(
        float((a.state[name].double() - b.state[name].double()).abs().max())
        for name in a.state
        if a.state[name].numel()
    )


def _stays() -> dict[str, Any]:
    return {"kind": "none"}


def _moves(at: Sequence[float], how: str, mode: str = "migrate") -> dict[str, Any]:
    at = [float(share) for share in at]
    return {"kind": "halfway", "at": at, "devices": [MOVER], "how": how, "mode": mode}


def _data(share: float, clients: int) -> dict[str, Any]:
    """Return parts of the data: one for the mover, and the others alike."""
    others = (1 - share) / (clients - 1)
    fractions = [share, *[others] * (clients - 2)]
    return {"partition": {"kind": "fractions", "fractions": fractions}}


# --------------------------------------------------------------------------------------------------
# Random faults


def _schedules(config: Config, folder: Path, count: int) -> dict[str, Any]:
    """Carry out runs with random faults; return what became of them."""
    small = {
        "num_clients": 2,
        "rounds": 1,
        "client": {"batch_size": 20},
        "data": {"examples": 240, "test_examples": 20},
    }
    runs = Runs(configuration.parse(configuration.with_values(config.text, **small)), folder)
    expected = runs.carry_out(mobility=_stays()).result["model_sha256"] if count else ""
    seconds, resumed, excluded, wrong = [0.0], 0, 0, list[str]()
    for number in range(count):
        values, began = schedule(number), time.monotonic()
        try:
            done = runs.carry_out(**values)
        except FedsysError as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
            continue
        finally:
            seconds.append(time.monotonic() - began)
        if done.lost:
            excluded += 1
        elif done.result["model_sha256"] == expected:
            resumed += 1
        else:
            wrong.append(f"{number}: another model")
    told = {"schedules": count, "resumed": resumed, "excluded": excluded, "wrong": len(wrong)}
    return {**told, "longest_s": max(seconds), "first_wrong": wrong[0] if wrong else ""}


def schedule(number: int) -> dict[str, Any]:
    """Return moves and faults that are drawn from a number, by group of the configuration."""
    draws = random.Random(number)
    at = sorted(draws.randrange(1, 12) / 12 for _ in range(draws.randint(1, 3)))
    how = draws.choice(["announced", "foreseen", "unannounced"])
    faults = []
    for _ in range(draws.randint(1, 2)):
        kind = draws.choice(_KINDS)
        fault = {"kind": kind, "round": 1, "step": draws.randrange(6)}
        fault["who"] = draws.choice([0, 1])
        if kind in ("edge_killed", "link_cut"):
            fault["position"] = draws.choice(AT_EDGE)
        if fault not in faults:
            faults.append(fault)
    return {
        "mobility": {"at": sorted(set(at)), "devices": [], "how": how},
        "faults": {"list": faults},
        "fleet": {"replicate_every": draws.choice([0, 2])},
    }


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the picture of the pauses."""
    cases = figures["cases"]
    labels = [f"{c['move_at']:g}, {c['share']:g}, {c['link_mbit_s']:g}" for c in cases]
    names = ("freeze", "encode", "transfer", "restore", "reconnect")
    series = {name: [float(c["parts_s"].get(name, 0.0)) for c in cases] for name in names}
    return Chart("Pause of a device that moves", "move at, share, Mbit/s", "s", labels, series)
