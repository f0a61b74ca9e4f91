"""One host's part of a pipeline, alone."""

import threading
from dataclasses import replace
from unittest.mock import Mock

import torch

from fedsys.errors import LinkClosed
from fedsys.partition.hosted_stage import HostedStage, Onward, StagePiece, Underway
from fedsys.transport.wire import Frame

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
    assert told.meta["dropped"] is True  # no host failed: it may be asked again


def ended_link():
    link = Mock()
    link.recv.side_effect = LinkClosed("the peer is gone")
    return link


def test_requests_that_wait_for_a_lost_host_are_told_when_their_stage_is_dropped():
    """They were those of another pipeline, and nobody told them: who reads answers had ended."""
    upstream = Mock()
    onward = Onward(ended_link(), "next", holds=True)
    stage = HostedStage("h", [StagePiece(0, lambda x: x)], end=1, onward=onward)
    x = torch.zeros(2, 3)
    stage.resume(underway(7, upstream), lambda: (x,), 0)
    assert 7 in stage.held
    assert stage.close()
    frame = upstream.send.call_args.args[0]
    assert (frame.kind, frame.meta["id"], frame.meta["dropped"]) == ("failed", 7, True)
    assert not stage.held


def test_a_request_that_is_sent_on_while_its_stage_is_dropped_is_told_so():
    """It stayed there, where nobody could send it on any more."""
    upstream, onward = Mock(), Mock()
    onward.send.side_effect = LinkClosed("the link was closed on this side")
    onward.recv.side_effect = lambda: threading.Event().wait()
    holds = Onward(onward, "next", holds=True)
    stage = HostedStage("h", [StagePiece(0, lambda x: x)], end=1, onward=holds)
    with stage._occupied():  # it is computed when it is dropped
        assert not stage.close(longest_s=0.01)
    stage._pass_on(replace(underway(7, upstream), frame=Frame("x", {}, {})), ())
    frame = upstream.send.call_args.args[0]
    assert (frame.kind, frame.meta["dropped"]) == ("failed", True)
