"""One host's part of a pipeline, alone."""

import threading
from unittest.mock import Mock

import torch

from fedsys.partition.hosted_stage import HostedStage, StagePiece, Underway

WAIT_S = 20.0


def underway(number, upstream):
    return Underway(number, upstream, 0.0, {"host": "h", "queue_s": 0.0, "compute_s": 0.0})


def test_what_computes_keeps_its_modules_until_it_is_done():
    """A pipeline was dropped while a request was between two of its layers, and the host answered
    that its model had no second layer."""
    entered, released, upstream = threading.Event(), threading.Event(), Mock()

    def run(x):
        entered.set()
        assert released.wait(WAIT_S)
        return x + 1

    stage = HostedStage("h", [StagePiece(0, run)], end=1)
    x = torch.zeros(2, 3)
    thread = threading.Thread(target=stage.resume, args=(underway(7, upstream), lambda: (x,), 0))
    thread.start()
    assert entered.wait(WAIT_S)
    assert not stage.close(longest_s=0.01)
    released.set()
    thread.join(WAIT_S)
    assert stage.close(longest_s=0.01)
    assert upstream.send.call_args.args[0].kind == "y"
    stage.resume(underway(8, upstream), lambda: (x,), 0)
    told = upstream.send.call_args.args[0]
    assert (told.kind, told.meta["id"]) == ("failed", 8)
    assert "the pipeline was dropped" in told.meta["reason"]
