"""The picture of who was where when: what it shows is what was decided and what became of moves."""

import dataclasses
import json

from fedsys.planning.moves import Handover
from fedsys.runs import decisions
from fedsys.runs.decisions import OffloadDecision
from fedsys.runs.mobility_plots import ALONE, draw, whereabouts
from fedsys.runs.report.loading import load
from fedsys.runs.report.moving import section


def made(round_, client, edge):
    return OffloadDecision(round_, client, "", 1, "conv", not edge, 0.5, 1, "fp32", edge)


def moved(client, round_, step, source, target, **more):
    return dataclasses.asdict(
        Handover(client, round_, step, source, target, "announced", 0.25, **more)
    )


MADE = [made(r, c, e) for r, c, e in ((1, 0, "a"), (1, 1, ""), (2, 0, "b"), (2, 1, "a"))]
MOVES = [moved(0, 1, 5, "a", "b"), moved(1, 2, 1, "a", "b", predicted_pause_s=0.2)]


def test_devices_are_where_they_began_and_then_where_they_went():
    found = [(w.client, w.begin, w.end, w.edge) for w in whereabouts(MADE, MOVES, [10, 4])]
    assert found == [
        (0, 1.0, 1.5, "a"), (0, 1.5, 2.0, "b"), (0, 2.0, 3.0, "b"),
        (1, 1.0, 2.0, ALONE), (1, 2.0, 2.25, "a"), (1, 2.25, 3.0, "b"),
    ]  # fmt: skip


def test_the_picture_is_drawn_and_stands_on_the_page(tmp_path):
    decisions.write(tmp_path, MADE)
    picture = draw(tmp_path, MOVES, [10, 4])
    assert picture is not None and picture.stat().st_size > 5000
    (tmp_path / "run.json").write_text(
        json.dumps({"status": "finished", "config": {}, "result": {"moves": MOVES}})
    )
    page = section(load(tmp_path))
    assert "2 moves" in page and "0.250 s at most" in page and "data:image/png" in page


def test_where_nobody_moves_there_is_no_picture(tmp_path):
    assert draw(tmp_path, [], [10]) is None
