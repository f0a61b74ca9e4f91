"""Frames between two processes of one machine."""

import socket
import threading

import pytest
import torch

from fedsys.errors import LinkClosed
from fedsys.transport.frame_pipe import FramePipe
from fedsys.transport.wire import Frame


@pytest.fixture
def pipe():
    ends = [FramePipe(one) for one in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def sent(pipe, *frames):
    """Send frames in a thread, as the system holds little; return what comes."""
    sends = threading.Thread(target=lambda: [pipe[0].send(frame) for frame in frames])
    sends.start()
    came = [pipe[1].recv() for _ in frames]
    sends.join()
    return came


def test_frames_come_as_they_were_whatever_their_size(pipe):
    large = torch.arange(3 << 20, dtype=torch.float32).reshape(2, 3, 1 << 10, 1 << 9)
    many = {f"t{i}": torch.full((i % 3,), i) for i in range(3000)}
    frames = [
        Frame("bare"),
        Frame("says", {"text": "x" * 200_000, "list": [1, [2.5, None]]}),
        Frame("large", {}, {"x": large.to(memory_format=torch.channels_last), "n": torch.empty(0)}),
        Frame("many", {"step": 3}, many),
        Frame("small", {}, {"x": torch.tensor(1.5, dtype=torch.bfloat16)}),
    ]
    came = sent(pipe, *frames)
    assert [(f.kind, f.meta) for f in came] == [(f.kind, f.meta) for f in frames]
    for one, other in zip(came, frames, strict=True):
        assert list(one.tensors) == list(other.tensors)
        for name, tensor in other.tensors.items():
            assert torch.equal(one.tensors[name], tensor)
            assert one.tensors[name].stride() == tensor.stride()


def test_who_waits_learns_that_the_other_process_is_gone(pipe):
    pipe[0].close()
    with pytest.raises(LinkClosed, match="at the other end is gone"):
        pipe[1].recv()
    with pytest.raises(LinkClosed, match="at the other end is gone"):
        pipe[1].send(Frame("says"))
    with pytest.raises(LinkClosed):  # closed here, as by who lets go of a session
        pipe[0].recv()


def test_a_frame_that_ends_in_the_middle_is_none():
    ours, theirs = socket.socketpair()
    ours.sendall(b"FSYS")
    ours.close()
    pipe = FramePipe(theirs)
    with pytest.raises(LinkClosed):
        pipe.recv()
    pipe.close()
