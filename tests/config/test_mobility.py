"""The group ``mobility`` and the places of edge servers: what is refused, and how it is said."""

import pytest

from fedsys.config import compose_text, parse
from fedsys.errors import ConfigError

SPLIT = ("policy=fixed", "num_edges=2")
TRACE = (*SPLIT, "mobility=trace", "mobility.file=fcd.xml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mobility=halfway"], "mobility=halfway: must go with split training"),
        (["policy=fixed", "mobility=halfway"], "must have two edge servers.*num_edges=2"),
        ([*SPLIT, "mobility=trace"], "mobility.file=None: must name the FCD output"),
        ([*SPLIT, "mobility=halfway", "mobility.at=[0.5,0.2]"], "must be in ascending order"),
        ([*SPLIT, "mobility=halfway", "mobility.at=[1.5]"], "from 0 to 1"),
        ([*SPLIT, "mobility=halfway", "mobility.at=[]"], "at least one"),
        ([*SPLIT, "mobility=halfway", "mobility.share=0"], "above 0 and at most 1"),
        ([*SPLIT, "mobility=halfway", "mobility.devices=[8]"], "from 0 to 7"),
        ([*SPLIT, "mobility=halfway", "mobility.mode=move"], "must be one of migrate, restart"),
        ([*SPLIT, "mobility=halfway", "mobility.how=forseen"], "did you mean 'foreseen'"),
        ([*SPLIT, "mobility=halfway", "mobility.piece=1"], "below the 1 pieces.*pipelined"),
        ([*SPLIT, "mobility=waypoint", "mobility.speed_m_s=[5]"], "least and the greatest speed"),
        ([*SPLIT, "mobility=waypoint", "mobility.speed_m_s=[0, 1]"], "above 0"),
        ([*SPLIT, "mobility=waypoint", "mobility.pause_s=[3, 1]"], "the least and the greatest"),
        ([*SPLIT, "mobility=waypoint", "mobility.area_m=[0, 1]"], "width and height"),
        ([*TRACE, "mobility.vehicles={a: 8}"], "mobility.vehicles.a=8: must be a device"),
        ([*TRACE, "mobility.vehicles={a: x}"], "mobility.vehicles.a=x: must be a device"),
        ([*TRACE, "mobility.vehicles={a: 1, b: 1}"], "must name each device once"),
        ([*TRACE, "mobility.unreachable=stop"], "must be one of wait, alone"),
        ([*TRACE, "mobility.coordinates=feet"], "must be one of metres, degrees"),
        ([*TRACE, "mobility.seconds_per_round=0"], "must be above 0"),
        ([*TRACE, "fleet.places=[{x: 1}]"], r"fleet.places\[0\].*must have x and y"),
        ([*TRACE, "fleet.places=[{x: 1, y: 2, lon: 3, lat: 4}]"], "must have x and y"),
        ([*TRACE, "fleet.places=[{x: 1, y: 2}]"], "as many as the 2 edge servers.*num_edges=1"),
        (
            [*TRACE, "fleet.places=[{x: 1, y: 2}, {lon: 1, lat: 2}]"],
            r"fleet.places\[1\].*as the first",
        ),
        ([*TRACE, "fleet.places=[{lon: 1, lat: 91}, {lon: 1, lat: 2}]"], "from -90 to 90"),
        ([*TRACE, "fleet.places=[{x: 1, y: 2, radius_m: 0}, {x: 1, y: 2}]"], "must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(overrides, words):
    with pytest.raises(ConfigError, match=words):
        parse(compose_text(" ".join(f"'{override}'" for override in overrides)))


def test_a_trace_is_named_from_wherever_a_run_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(compose_text(" ".join(TRACE)))
    assert config.mobility.file == str(tmp_path / "fcd.xml")


def test_without_the_group_nobody_moves(configure):
    assert not configure().mobility.active
    assert configure("policy=fixed", "num_edges=2", "mobility=commuters").mobility.active
