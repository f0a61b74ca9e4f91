"""SUMO's FCD output: what is written is what is read, and all else is refused by its place."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.errors import ConfigError
from fedsys.planning.mobility.fcd import Fix, read, seconds_of
from tests.planning.mobility.sumo_files import as_csv, as_xml, write

STEPS = {
    0.0: [],
    1.0: [("veh0", -1.6, 591.7)],
    2.0: [("veh0", -1.6, 578.13), ("veh1", 12.3, 198.4)],
    3.0: [("veh1", 24.05, 198.4)],
    4.0: [],
}
FIXES = [Fix(at, *one) for at, vehicles in STEPS.items() for one in vehicles]


@pytest.mark.parametrize("suffix", ["xml", "xml.gz", "csv", "csv.gz", "fcd"])
@pytest.mark.parametrize("kind", ["vehicle", "person"])
def test_all_forms_of_a_trace_say_the_same(tmp_path, suffix, kind):
    """The columns of a table are named after what moves first: a person may be a ``vehicle_x``."""
    form = as_csv if "csv" in suffix else as_xml
    assert list(read(write(tmp_path / f"a.{suffix}", form(STEPS, kind=kind)))) == FIXES


@pytest.mark.parametrize(
    "text",
    [
        as_csv(STEPS, mark=","),
        as_csv(STEPS, mark="\t"),
        "\ufeff" + as_csv(STEPS),
        as_csv(STEPS).replace("\n", "\r\n"),
        as_csv(STEPS).replace("timestep_", "").replace("vehicle_", ""),  # column-header plain
        as_csv(STEPS).replace(".00;", ";", 1),
        as_csv(STEPS).replace("\n2.00", "\n00:00:02").replace("\n3.00", "\n0:00:00:03.00"),
    ],
)
def test_tables_may_be_written_otherwise(tmp_path, text):
    assert list(read(write(tmp_path / "a.csv", text))) == FIXES


def test_times_of_day_are_seconds():
    assert seconds_of("10:00:01") == 36001.0
    assert seconds_of("2:00:00:00") == 172800.0
    for text in ("1:00", "a:00:00", "1:-2:00", "", "1:0:0:0:0"):
        with pytest.raises(ValueError):
            seconds_of(text)


XML, CSV = as_xml(STEPS), as_csv(STEPS)
BOMB = '<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY b "cccc"><!ENTITY d "&b;&b;">]>\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n\n \n", "is empty"),
        ("PAR1\x15\x04", "is Parquet"),
        (XML.replace('time="3.00"', 'time="0.50"'), r"line \d+=0.5: must not go back: 2 s"),
        (CSV.replace("\n3.00", "\n0.50"), r"line 6=0.5: must not go back: 2 s"),
        (CSV.replace("\n4.00", "\n0.50"), r"line 7=0.5: must not go back: 3 s"),
        (XML.replace('x="-1.60"', 'x="west"'), r"line \d+, x=west: must be a finite number"),
        (XML.replace('y="591.70"', ""), r"y=None: must be a finite number"),
        (XML.replace('y="591.70"', 'y="inf"'), r"y=inf: must be a finite number"),
        (XML.replace('id="veh0"', 'id=""'), "must have an id"),
        (XML.replace('time="2.00"', 'time="now"'), "now: must be a time in seconds"),
        (XML.replace('time="2.00"', ""), "None: must be a time in seconds"),
        (XML[:-30], "must be whole XML"),
        (XML.replace("fcd-export", "routes"), "with the root fcd-export: it is routes"),
        (BOMB + XML.partition("\n")[2], "must have no document type"),
        (CSV.replace("591.70", "north"), "line 3, vehicle_y=north: must be a finite number"),
        (CSV.replace("591.70", "nan"), "line 3, vehicle_y=nan: must be a finite number"),
        (CSV.replace("591.70;", ""), "must have the 8 columns of the first line"),
        (CSV.replace("\n2.00", "\n"), "must be a time in seconds"),
        (CSV.replace("vehicle_x", "vehicle_lane"), "names no column vehicle_x"),
        (CSV.partition("\n")[2], "names no column timestep_time.*column-header none"),
        (CSV.replace("veh1", '"veh1'), "must be a table"),
    ],
)
def test_what_is_no_trace_is_refused_by_its_place(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        list(read(write(tmp_path / "a", text)))


def test_files_that_cannot_be_read_are_said_to(tmp_path):
    whole = write(tmp_path / "a.gz", XML).read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[:-20])
    (tmp_path / "bad.gz").write_bytes(whole[:40] + b"\0\0\0\0" + whole[44:])
    (tmp_path / "latin").write_bytes(CSV.replace("veh0", "véh0").encode("latin-1"))
    for name in ("cut.gz", "bad.gz", "latin", "absent", "."):
        with pytest.raises(ConfigError, match=r"mobility.file="):
            list(read(tmp_path / name))


def test_an_endless_token_is_not_collected(tmp_path):
    (tmp_path / "a").write_bytes(b"<fcd-export " + b"a" * (6 << 20))
    with pytest.raises(ConfigError, match="must have time steps"):
        list(read(tmp_path / "a"))


# --------------------------------------------------------------------------------------------------
# Whatever there may be

_NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters=';"'),
    min_size=1, max_size=6,
)  # fmt: skip
_METRES = st.integers(-(10**7), 10**7).map(lambda n: n / 100)
_STEPS = st.lists(
    st.dictionaries(_NAMES, st.tuples(_METRES, _METRES), max_size=4), min_size=1, max_size=6
).map(
    lambda rows: {
        float(i): [(name, x, y) for name, (x, y) in row.items()] for i, row in enumerate(rows)
    }
)


@given(_STEPS, st.sampled_from([".xml", ".csv", ".xml.gz"]))
def test_every_trace_is_read_as_it_was_written(steps, suffix):
    with tempfile.TemporaryDirectory() as folder:
        form = as_csv if suffix == ".csv" else as_xml
        found = list(read(write(Path(folder) / f"a{suffix}", form(steps))))
    assert found == [Fix(at, *one) for at, vehicles in steps.items() for one in vehicles]


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x1f\x8b", XML.encode(), CSV.encode()]))
def test_any_bytes_are_read_or_refused(data, before):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(before + data)
        try:
            assert all(isinstance(fix, Fix) for fix in read(path))
        except ConfigError as error:
            assert str(error).startswith("mobility.file=")


@given(st.integers(0, len(XML) - 2))
def test_a_trace_of_a_killed_simulation_is_refused(length):
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ConfigError):
        list(read(write(Path(folder) / "a", XML[:length])))
