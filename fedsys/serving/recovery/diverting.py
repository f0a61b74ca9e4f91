"""Sending requests that are under way into another pipeline, from where they are held.

Each host keeps what it sent on until it is answered, and the entry keeps the inputs. If the host
before the lost one has a stage of the new pipeline too, in which requests may go on at the boundary
where they are, nothing before is computed again; their answers come back the way they came. Else
the entry sends the inputs anew.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from fedsys.errors import FedsysError, first_line
from fedsys.serving.chain import ChainModule, Stood
from fedsys.serving.recovery.watch import HostWatch
from fedsys.serving.routes import common_units

_log = logging.getLogger(__name__)


def divert(
    old: ChainModule, new: ChainModule, gone: Collection[int], units: int, watch: HostWatch | None
) -> int:
    """Have another pipeline answer what is under way in one, and what comes.

    Args:
        old: The pipeline that lost a host.
        new: One that stands.
        gone: Hosts that are lost.
        units: Of the whole model.
        watch: Takes the order to the host that holds requests; None: the entry sends them anew.

    Returns:
        How many requests were under way where they were held.
    """
    place = _place(old, new, gone, units)
    if watch is not None and place is not None:
        before, there = place
        order = {"pipeline": before.key, "to": there.key, "first": before.boundaries[-1]}
        try:
            reply = watch.order(before.index, "divert", order)
        except FedsysError as error:
            _log.info("%s cannot go on: %s", before.host.name, first_line(error))
        else:
            old.pipeline.pass_on(new.pipeline)
            return int(reply.meta["requests"])
    return old.pipeline.divert(new.pipeline)


def _place(
    old: ChainModule, new: ChainModule, gone: Collection[int], units: int
) -> tuple[Stood, Stood] | None:
    """Return the last stage before those that are lost, and the one that can go on there."""
    lost = next((i for i, stood in enumerate(old.stages) if stood.index in gone), 0)
    if not lost:
        return None
    before = old.stages[lost - 1]
    there = next((stood for stood in new.stages if stood.host is before.host), None)
    common = min(common_units(module.route.way, units) for module in (old, new))
    end = before.boundaries[-1]
    if there is None or end > common or end not in there.boundaries:
        return None
    return before, there
