"""Where devices are cut, in words that group what is alike."""

from hypothesis import given
from hypothesis import strategies as st

from fedsys.runs.cuts import Alike, alike, joined, ranges

SPLIT = {"index": 1, "unit": "conv1", "device_share": 0.0432, "micro_batches": 16, "codec": "fp32"}
WHOLE = {"index": 5, "unit": "fc", "device_share": 1.0}


def test_devices_that_do_the_same_share_a_line():
    cuts = {
        **{str(k): {**SPLIT, "machine": "pi3", "edge": f"edge-{k % 2}"} for k in range(10)},
        "10": {**WHOLE, "machine": "jetson"},
    }
    assert [str(line) for line in alike(cuts)] == [
        "pi3 (clients 0 to 9): cut 1 after conv1, 4.32% of the work on the device; "
        "16 pieces, fp32; edge-0, edge-1",
        "jetson (client 10): the whole model on the device",
    ]


def test_what_is_not_known_is_left_out():
    """The result of an older run has index, unit and share alone."""
    bare = {"index": 0, "unit": "", "device_share": 0.0}
    assert alike({"3": bare}) == [Alike("", (3,), "cut 0, 0% of the work on the device", "", ())]
    assert alike({}) == []


@given(st.sets(st.integers(0, 200), max_size=40))
def test_ranges_say_every_number_once(numbers):
    said = []
    for part in filter(None, ranges(sorted(numbers)).split(", ")):
        first, _, last = part.partition(" to ")
        said += range(int(first), int(last or first) + 1)
    assert said == sorted(numbers)


def test_names_are_counted_in_their_order():
    assert joined(["pi4", "pi4", "jetson"]) == "2 pi4, 1 jetson"
