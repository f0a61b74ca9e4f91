"""How long the virtual clock takes for rounds of many vehicles that move over many edge servers.

Positions are those of an FCD file of SUMO, or random waypoints. Nothing is trained: every device
has the same cut, is at its nearest edge server, and moves as its position says.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from fedsys.commands.bench import Chart
from fedsys.commands.bench.pipeline_virtual import CLASSES, SHAPE
from fedsys.config import Config, MobilityConfig
from fedsys.planning.assignment import Assignment
from fedsys.planning.mobility.positions import Positioned
from fedsys.planning.mobility.sources import source_of
from fedsys.planning.moves import Move
from fedsys.planning.options import machines_of, run_workload
from fedsys.planning.virtual_clock import VirtualRound, Ways, virtual_round
from fedsys.training.federation import layered_model


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Play rounds.

    Args:
        config: The model, the fleet and the network.
        options: Those of ``conf/bench/vehicles.yaml``.

    Returns:
        ``rows``: of each round its virtual seconds (``round_s``), ``handovers``, ``foreseen``,
        bytes, pauses, and ``seconds`` by the clock of this machine: for the moves and for playing;
        ``read_s``, to read the trace; ``slowest_s``, the longest round.

    Raises:
        ConfigError: The trace is not usable, or the fleet names no machines.
    """
    count, edges = int(options["vehicles"]), int(options["edges"])
    file = str(options["file"])
    mobility = MobilityConfig(kind="trace" if file else "waypoint", file=file or None)
    asked = dataclasses.replace(
        config, num_clients=count, num_edges=edges, rounds=int(options["rounds"]), mobility=mobility
    )
    layers = layered_model(asked, SHAPE, CLASSES)
    machines = machines_of(asked, layers)
    load = run_workload(asked, layers, machines, [int(options["examples"])])
    workers = int(options["workers"])
    busy = tuple(dataclasses.replace(edge, workers=workers) for edge in machines.edges)
    load = dataclasses.replace(load, edges=tuple(busy[i % len(busy)] for i in range(edges)))
    began = time.perf_counter()
    source = source_of(asked, edges)
    read_s = time.perf_counter() - began
    assert isinstance(source, Positioned)
    rows = []
    for number in range(1, asked.rounds + 1):
        began = time.perf_counter()
        choices, ways = _settled(source, number, count, edges, options)
        decided = time.perf_counter()
        played = virtual_round(load, choices, ways=ways, most=int(options["most_turns"]))
        ended = time.perf_counter()
        rows.append(
            {
                "round": number,
                **_figures(played, ways),
                "moves_seconds": decided - began,
                "play_seconds": ended - decided,
                "seconds": ended - began,
            }
        )
    slowest = max(row["seconds"] for row in rows)
    return {"rows": rows, "read_s": read_s, "slowest_s": slowest, "vehicles": count, "edges": edges}


def _figures(played: VirtualRound, ways: Ways) -> dict[str, Any]:
    """Return what came of the moves of a round."""
    moves = [move for move in played.timeline.moves if move.source != move.target]
    return {
        "round_s": played.seconds,
        "handovers": len(moves),
        "foreseen": sum(m.how == "foreseen" for own in ways.moves.values() for m in own),
        "vehicles_moving": len({move.job for move in moves}),
        "bytes": sum(move.bytes for move in moves),
        "longest_pause_s": max((move.pause_s for move in moves), default=0.0),
    }


def _settled(
    source: Positioned, number: int, count: int, edges: int, options: Mapping[str, Any]
) -> tuple[list[Assignment], Ways]:
    """Return what devices do in a round, and where they go."""
    names, who = [f"edge-{i}" for i in range(edges)], range(count)
    places = source.places(number, who, names)
    cut = int(options["cut"])
    choices = [Assignment(cut, places.get(k) or 0, micro_batches=1) for k in who]
    moves: dict[int, tuple[Move, ...]] = {}
    for move in source.moves(number, who, names):
        moves[move.client] = (*moves.get(move.client, ()), move)
    return choices, Ways(moves, source.waits(number, who))


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the seconds that rounds took this machine."""
    rows = figures["rows"]
    return Chart(
        f"{figures['vehicles']} vehicles over {figures['edges']} edge servers: a round is played "
        f"in at most {figures['slowest_s']:.1f} s",
        "round",
        "seconds of this machine",
        [str(row["round"]) for row in rows],
        {
            "moves": [row["moves_seconds"] for row in rows],
            "playing": [row["play_seconds"] for row in rows],
        },
    )
