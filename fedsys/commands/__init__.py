"""The verbs of the command line, one module each: ``fedsys plan`` is `fedsys.commands.plan`.

Each has a function ``job``, which takes the composed configuration (or what stands behind the verb,
where there is nothing to compose) and returns the figures of the JSON line. `fedsys.main` knows
them by name, so that a command imports no other.
"""

from fedsys import TYPE_CHECKING

__all__ = [
    "bench",
    "completion",
    "device",
    "doctor",
    "edge",
    "host",
    "partition",
    "plan",
    "profile",
    "provision",
    "prune",
    "query",
    "report",
    "runs",
    "serve",
    "server",
    "train",
]

if TYPE_CHECKING:
    from fedsys.commands import (
        bench,
        completion,
        device,
        doctor,
        edge,
        host,
        partition,
        plan,
        profile,
        provision,
        prune,
        query,
        report,
        runs,
        serve,
        server,
        train,
    )
