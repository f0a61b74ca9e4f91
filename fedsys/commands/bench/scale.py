"""Rounds per second and memory of the runtimes by the number of virtual clients.

Each case is a run of its own in a new process: all clients take part in every round, each makes
one optimizer step. The rate is that of the rounds after the first. Memory is the largest seen of
the process and all that it started, in MB (10^6 bytes): proportional size, which counts a page
that several processes share once, and resident size, which counts it for each of them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from fedsys import config as configuration
from fedsys.commands.bench import Chart
from fedsys.config import Config
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.runs.folder import RunFolder
from fedsys.runtime.processes import wait_or_kill

LOOK_S = 1.0
"""Seconds between two looks at the memory."""

END_S = 30.0
"""Seconds that a run has to end when it is told to."""


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a run for each runtime and number of clients.

    Args:
        config: What all runs have in common.
        options: ``clients``, the numbers of clients by runtime, and ``examples_per_client``.

    Returns:
        ``cases``: for each ``runtime`` and number of ``clients`` the ``rounds_per_s``, seconds of
        the first round and until it began, ``pss_mb``, ``rss_mb`` and the number of processes.

    Raises:
        ConfigError: There is no round after the first.
        RuntimeFailure: A run failed.
    """
    if config.rounds < 2:
        raise ConfigError.of(
            "rounds", config.rounds, "must be at least 2: the first is not counted"
        )
    cases = [
        _case(config, str(kind), int(clients), int(options["examples_per_client"]))
        for kind, counts in options["clients"].items()
        for clients in counts
    ]
    return {"cases": cases, "rounds": config.rounds}


def _case(config: Config, kind: str, clients: int, examples: int) -> dict[str, Any]:
    folder = Path(str(config.run.dir)) / f"{kind}-{clients}"
    text = configuration.with_values(
        config.text,
        num_clients=clients,
        json=True,
        run={"dir": str(folder)},
        runtime={"kind": kind},
        data={"examples": clients * examples},
    )
    configuration.parse(text)  # a wrong name is said before anything is started
    print(f"{kind}: {clients:,} clients", file=sys.stderr)
    peak = _watched(text, folder.with_suffix(".log"))
    done = RunFolder.open(folder)
    ends = [float(row["seconds_elapsed"]) for row in done.rounds()]
    return {
        "runtime": kind,
        "clients": clients,
        "rounds_per_s": (len(ends) - 1) / (ends[-1] - ends[0]),
        "first_round_s": ends[0],
        "to_first_round_s": done.info["result"]["seconds_to_first_round"],
        **peak,
    }


def _watched(text: str, log: Path) -> dict[str, Any]:
    """Carry a run out in a process of its own and return the largest memory seen."""
    command = [sys.executable, "-m", __name__]
    with log.open("wb") as stream, _ended(command, stream) as process:
        assert process.stdin is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        seen = {"pss_mb": 0.0, "rss_mb": 0.0, "processes": 0}
        while process.poll() is None:
            now = memory_of_tree(process.pid)
            seen = {name: max(value, now[name]) for name, value in seen.items()}
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeFailure(f"a run of the benchmark failed: {said[-1] if said else 'no word'}")
    return seen


@contextlib.contextmanager
def _ended(command: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process, and end it with the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        wait_or_kill(process, END_S)


def memory_of_tree(pid: int) -> dict[str, float]:
    """Return the memory of a process and all that it started, in MB, and how many they are."""
    pss = rss = processes = 0
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(pid)
        for process in [family, *family.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                memory = process.memory_full_info()
                pss += getattr(memory, "pss", memory.rss)  # known on Linux only
                rss += memory.rss
                processes += 1
    return {"pss_mb": pss / 1e6, "rss_mb": rss / 1e6, "processes": processes}


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the rounds per second of each runtime by the number of clients."""
    cases = figures["cases"]
    counts = sorted({case["clients"] for case in cases})
    rates = {(case["runtime"], case["clients"]): case["rounds_per_s"] for case in cases}
    kinds = list(dict.fromkeys(case["runtime"] for case in cases))
    return Chart(
        "All clients take part, one step each",
        "virtual clients",
        "rounds per second",
        [f"{count:,}" for count in counts],
        {kind: [rates.get((kind, count), float("nan")) for count in counts] for kind in kinds},
        lines=True,
        log=True,
    )


if __name__ == "__main__":
    from fedsys import runtime

    runtime.run(configuration.parse(sys.stdin.read()))
