"""A device moves between edge servers in the middle of a round: what that takes, and what it saves.

Edge servers are processes of their own, ``fedsys edge``, whose links to each other are slowed down
to a rate; devices are threads of this process, with links as fast as they are. The rival begins the
mover's round anew where it arrives, as SplitFed without migration does: of a round with a move
after a share p, FedFly's saving is at most p / (1 + p).

It takes a while: each case that is done is said, and with ``bench.kept`` written down, so that the
benchmark goes on where it was interrupted.

A schedule of faults is a run with moves at random points and with an edge server that is killed or
links that are cut, slowed down or corrupted around them, all drawn from its number. It must end
with the model of the run without any of that, or say whom it left out. Where a fault found nobody
to strike, as an edge server whose devices went to the other one when that was killed first, the
run counts as not struck; its model is compared all the same.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.commands.bench.rounds import EdgeProcess, Watching, edge_process
from fedsys.config import Config
from fedsys.errors import FedsysError, RuntimeFailure
from fedsys.faults import AT_EDGE, NotStruck
from fedsys.files import append, whole_lines
from fedsys.identity import state_sha256
from fedsys.models.layers import resolve_cut
from fedsys.planning.costs import crossings, frame_bytes, state_bytes
from fedsys.planning.handing_over import Price, price
from fedsys.planning.workload import EdgeLink
from fedsys.runs.resume import digest
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import play_local
from fedsys.training import federation
from fedsys.training.optimizers import state_share
from fedsys.transport.security import new_token

MOVER: Final = 0
MODEL: Final = "model.safetensors"
MIRRORED: Final = "mirrored"
_AHEAD: Final = ("foreseen", MIRRORED)
_KINDS: Final = ("edge_killed", "link_cut", "link_slow", "link_corrupted", "link_duplicated")


@dataclass(frozen=True)
class MeasuredRun:
    """A run that was carried out.

    Attributes:
        result: Of the run.
        mover_s: Seconds that the mover trained.
        state: The model.
        lost: Clients that were left out of a round, as its events say.
        missed: Faults that did not strike, in words; empty: all did.
    """

    result: Mapping[str, Any]
    mover_s: float
    state: Mapping[str, Any]
    lost: int
    missed: str = ""


class Kept:
    """What was measured so far, of a benchmark that may be interrupted.

    Args:
        path: A file of lines; None keeps nothing.
        config: The runs: what was measured of others is not taken.
    """

    def __init__(self, path: Path | None, config: Config) -> None:
        self._path, self._of = path, digest(config)
        self._known: dict[str, Any] = {}
        for line in whole_lines(path) if path else ():
            entry = json.loads(line)
            if entry["of"] == self._of:
                self._known[entry["key"]] = entry["value"]

    def measured(self, measure: Callable[[], Any], *key: object) -> Any:
        """Return what was measured, or measure it now."""
        name = json.dumps(key)
        if name not in self._known:
            began = time.monotonic()
            self._known[name] = value = measure()
            _say(f"{' '.join(map(str, key))}: {time.monotonic() - began:.1f} s")
            if self._path is not None:
                line = json.dumps({"of": self._of, "key": name, "value": value})
                append(self._path, f"{line}\n".encode())
        return self._known[name]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Runs:
    """Carries runs out on the same edge servers.

    Args:
        config: What they have in common.
        folder: Where they leave what they leave, for a moment.
        edges: The edge servers; none: each run has its own, as threads.
    """

    def __init__(self, config: Config, folder: Path, edges: Sequence[EdgeProcess] = ()) -> None:
        self.config, self._folder, self._edges = config, folder, edges

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
            "runtime": {"kind": "local", "workers": self.config.num_clients},
            "fleet": fleet,
        }
        text = configuration.with_values(self.config.text, **given, **values)
        made = configuration.parse(text)
        try:
            server, client = load_apps(made)
            watching = Watching(client)
            missed = _missed(partial(play_local, made, server, watching))
            left = json.loads((path / "run.json").read_text(encoding="utf-8"))
            state = load_file(path / MODEL)
            result = {"model_sha256": state_sha256(state)} if missed else left["result"]
            seen = watching.watch.observations.get(MOVER)
            events = path / "events.jsonl"
            told = events.read_text(encoding="utf-8") if events.exists() else ""
            lost = told.count('"client_lost"')
            mover_s = seen.seconds if seen else 0.0
            return MeasuredRun(result, mover_s, state, lost, missed)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _missed(play: Callable[[], object]) -> str:
    """Play a run; return what did not strike in it, in words."""
    try:
        play()
    except NotStruck as error:
        return str(error)
    return ""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures; see the module.

    Args:
        config: The runs.
        options: ``move_at``, ``shares``, ``links_mbit_s``, ``hows``, ``moves``, ``schedules``,
            ``kept``.

    Returns:
        ``cases``, ``max_abs_diff`` over all of them and over runs with ``moves`` moves, and what
        became of the ``schedules``.
    """
    folder = Path(str(config.run.dir)) / "migration"
    folder.mkdir()
    kept = Kept(Path(options["kept"]).expanduser() if options["kept"] else None, config)
    token = new_token()
    with ExitStack() as stack:
        edges = [
            stack.enter_context(edge_process(name=f"edge-{i}", token=token))
            for i in range(config.num_edges)
        ]
        runs = Runs(config, folder, edges)
        runs.carry_out(mobility=_stays())  # what is imported and made once
        cases = list(_cases(runs, config, options, kept))
        apart = [case["max_abs_diff"] for case in cases] + list(_moved_often(runs, options, kept))
    figures = {"cases": cases, "max_abs_diff": max(apart, default=0.0)}
    return {**figures, **_schedules(config, folder, int(options["schedules"]), kept)}


def _cases(
    runs: Runs, config: Config, options: Mapping[str, Any], kept: Kept
) -> Iterator[dict[str, Any]]:
    for share in options["shares"]:
        data = _data(float(share), config.num_clients)
        still = Later(partial(runs.carry_out, data=data, mobility=_stays()))
        for at in options["move_at"]:
            again = partial(_restarted_s, runs, data, at)
            restart_s = kept.measured(again, "restart", share, at)
            for rate, how in product(options["links_mbit_s"], options["hows"]):
                place = float(at), float(share), float(rate), str(how)
                measure = partial(_case, runs, data, *place, still, restart_s)
                yield kept.measured(measure, "move", *place)


class Later:
    """A run that is carried out once somebody wants to know of it.

    Args:
        carry_out: Does it.
    """

    def __init__(self, carry_out: Callable[[], MeasuredRun]) -> None:
        self._carry_out, self._done = carry_out, list[MeasuredRun]()

    def run(self) -> MeasuredRun:
        """Return the run."""
        if not self._done:
            self._done.append(self._carry_out())
        return self._done[0]


def _restarted_s(runs: Runs, data: Mapping[str, Any], at: float) -> float:
    """Return the seconds that the mover trains if its round begins anew where it arrives."""
    mobility = _moves([at], "announced", "restart")
    # With emulated links, as both have the same threads about their links then
    return runs.carry_out(data=data, mobility=mobility, network={"emulate": True}).mover_s


def _case(
    runs: Runs,
    data: Mapping[str, Any],
    at: float,
    share: float,
    rate: float,
    how: str,
    still: Later,
    restart_s: float,
) -> dict[str, Any]:
    """Return the figures of one move.

    Raises:
        RuntimeFailure: The device did not move.
    """
    moved = runs.carry_out(
        data=data,
        mobility=_moves([at], how),
        fleet={"between": {"mbit_s": rate}},
        network={"emulate": True},
    )
    if not moved.result["moves"]:
        raise RuntimeFailure("bench migration: the device did not move")
    told = moved.result["moves"][0]
    on_the_wire = 8 * told["bytes"] / (1e6 * rate)
    expected = _expected(runs.config, rate, how)
    return {
        "move_at": at,
        "share": share,
        "link_mbit_s": rate,
        "how": how,
        "saved": 1 - moved.mover_s / restart_s if restart_s else float("nan"),
        "at_most": told["at"] / (1 + told["at"]),  # by whole mini-batches
        "pause_s": told["pause_s"],
        "predicted_pause_s": expected.pause_s,
        "predicted_bytes": expected.bytes,
        "on_the_wire_s": on_the_wire,
        "goal_s": 1.25 * on_the_wire + 0.05,
        "bytes": told["bytes"],
        "precopied_bytes": told["precopied_bytes"],
        "parts_s": dict(told["parts_s"]),
        "parts_off": sum(told["parts_s"].values()) / told["pause_s"] - 1,
        "max_abs_diff": _apart(still.run(), moved),
    }


def _expected(config: Config, rate: float, how: str) -> Price:
    """Return what the planner and the virtual clock take a move for."""
    dataset = federation.federation(config).dataset
    layers = federation.layers_of(config, dataset)
    cut = resolve_cut(layers, config.policy["cut"])
    weights = float(sum(state_bytes(layers)[cut:]))
    state = state_share(config.client) * weights
    up = frame_bytes(crossings(layers)[cut - 1], config.client.batch_size, "fp32", labels=True)
    shadow = float(up) if how == MIRRORED else 0.0
    return price(weights, state, EdgeLink(1e6 * rate), ahead=how in _AHEAD, mirrored=shadow)


def _moved_often(runs: Runs, options: Mapping[str, Any], kept: Kept) -> Iterator[float]:
    still = Later(partial(runs.carry_out, mobility=_stays()))
    for count in options["moves"]:
        yield kept.measured(partial(_moved, runs, int(count), still), "moves", count)


def _moved(runs: Runs, count: int, still: Later) -> float:
    """Return how far apart the model of a run is whose mover moves several times.

    Raises:
        RuntimeFailure: It moved less often.
    """
    at = [(i + 0.5) / count for i in range(count)]
    moved = runs.carry_out(mobility=_moves(at, "announced"))
    if len(moved.result["moves"]) != count:
        made = len(moved.result["moves"])
        raise RuntimeFailure(f"bench migration: the device moved {made} times of {count}")
    return _apart(still.run(), moved)


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
    moves = {"kind": "halfway", "at": at, "devices": [MOVER], "mode": mode}
    mirror = how == MIRRORED
    return {**moves, "how": "foreseen" if mirror else how, "mirror": mirror}


def _data(share: float, clients: int) -> dict[str, Any]:
    """Return parts of the data: one for the mover, and the others alike."""
    others = (1 - share) / (clients - 1)
    fractions = [share, *[others] * (clients - 2)]
    return {"partition": {"kind": "fractions", "fractions": fractions}}


# --------------------------------------------------------------------------------------------------
# Random faults


_GOOD: Final = ("resumed", "excluded", "not struck")

_SMALL: Final = {
    "num_clients": 2,
    "rounds": 1,
    "client": {"batch_size": 10},
    "data": {"examples": 120, "test_examples": 20},
}


def _schedules(config: Config, folder: Path, count: int, kept: Kept) -> dict[str, Any]:
    """Carry out runs with random faults; return what became of them."""
    runs = Runs(configuration.parse(configuration.with_values(config.text, **_SMALL)), folder)
    still = Later(partial(runs.carry_out, mobility=_stays()))
    ended = [
        kept.measured(partial(_struck, runs, number, still), "schedule", number)
        for number in range(count)
    ]
    what = [str(one["what"]) for one in ended]
    wrong = [f"{i}: {one}" for i, one in enumerate(what) if one not in _GOOD]
    return {
        "schedules": count,
        "resumed": what.count("resumed"),
        "excluded": what.count("excluded"),
        "not_struck": what.count("not struck"),
        "wrong": len(wrong),
        "longest_s": max((float(one["seconds"]) for one in ended), default=0.0),
        "first_wrong": wrong[0] if wrong else "",
    }


def _struck(runs: Runs, number: int, still: Later) -> dict[str, Any]:
    """Carry out one schedule of faults; return how it ended, and how long it took."""
    expected, began = still.run().result["model_sha256"], time.monotonic()
    try:
        done = runs.carry_out(**schedule(number))
    except FedsysError as error:
        what = f"{type(error).__name__}: {error}"
    else:
        what = _ended(done, done.result["model_sha256"] == expected)
    return {"what": what, "seconds": time.monotonic() - began}


def _ended(done: MeasuredRun, same: bool) -> str:
    """Return how a run with faults ended, by whether it has the model of that without."""
    if done.lost:
        return "excluded"
    if not same:
        return "another model"
    return "not struck" if done.missed else "resumed"


def schedule(number: int) -> dict[str, Any]:
    """Return moves and faults that are drawn from a number, by group of the configuration."""
    draws = random.Random(number)
    moves = sorted({draws.randrange(1, 12) / 12 for _ in range(draws.randint(1, 3))})
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
        "faults": {"list": faults},
        "fleet": {"replicate_every": draws.choice([0, 2])},
        # The last draw: schedules of before have the same moves and faults
        "mobility": {"at": moves, "devices": [], "how": how, "mirror": draws.choice([False, True])},
    }


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the picture of the pauses."""
    cases = figures["cases"]
    labels = [f"{c['move_at']:g}, {c['share']:g}, {c['link_mbit_s']:g}" for c in cases]
    names = ("freeze", "encode", "transfer", "restore", "reconnect")
    series = {name: [float(c["parts_s"].get(name, 0.0)) for c in cases] for name in names}
    return Chart("Pause of a device that moves", "move at, share, Mbit/s", "s", labels, series)
