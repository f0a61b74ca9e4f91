"""Problems that Hypothesis draws."""

import math

from hypothesis import strategies as st

from fedsys.partition.problem import Constraints, Host, Problem
from fedsys.planning.costs import Crossing, MachineCosts, Messaging
from fedsys.transport.network import Network

SECONDS = st.floats(0, 1, allow_subnormal=False)


@st.composite
def hosts(draw, units: int, name: str) -> Host:
    seconds = tuple(draw(st.lists(SECONDS, min_size=units, max_size=units)))
    messaging = Messaging(draw(SECONDS) / 10, {"fp32": draw(SECONDS) / 1e3, "int8": 2e-4})
    costs = MachineCosts(
        name, (1,), (seconds,), (seconds,), (0.0,) * units, draw(SECONDS) / 10, 0.0, messaging
    )
    memory = draw(st.one_of(st.just(math.inf), st.floats(0, 400)))
    power = draw(st.one_of(st.none(), st.floats(0, 10)))
    return Host(name, costs, memory, power, draw(st.floats(0, 2)), draw(SECONDS) / 10)


@st.composite
def problems(draw, most_units: int = 5, most_hosts: int = 4, codecs=None) -> Problem:
    units = draw(st.integers(1, most_units))
    count = draw(st.integers(2, most_hosts))
    inner = draw(st.sets(st.integers(1, units - 1))) if units > 1 else set()
    crossing = tuple(
        Crossing(draw(st.integers(1, 100)), draw(st.integers(1, 4))) for _ in range(units + 1)
    )
    rates = st.floats(1e3, 1e7)
    networks = tuple(
        Network(draw(rates), draw(rates), draw(SECONDS) / 10) for _ in range(count - 1)
    )
    known = codecs or draw(st.sampled_from([("fp32",), ("fp32", "int8"), ("int8",)]))
    return Problem(
        tuple(f"u{i}" for i in range(units)),
        (0, *sorted(inner), units),
        crossing,
        tuple(draw(st.integers(0, 100)) for _ in range(units)),
        tuple(draw(hosts(units, f"h{h}")) for h in range(count)),
        networks,
        rows=draw(st.integers(1, 3)),
        codecs=known,
        requests_per_s=draw(st.sampled_from([0.0, 0.1, 0.5])),
        constraints=draw(constraints(units, count)),
    )


@st.composite
def constraints(draw, units: int, count: int) -> Constraints:
    places = st.tuples(st.integers(0, units - 1), st.integers(0, count - 1))
    limit = draw(st.one_of(st.just(math.inf), st.floats(0.01, 10)))
    return Constraints(
        dict(draw(st.lists(places, max_size=1))),
        frozenset(draw(st.sets(places, max_size=2))),
        dict(draw(st.lists(st.tuples(st.integers(0, count - 1), st.floats(0, 2000)), max_size=1))),
        limit,
    )
