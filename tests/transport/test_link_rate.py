"""Rates of links, by a link whose answers take what they are told to."""

import pytest

from fedsys.transport import link_rate
from fedsys.transport.link_rate import measure, reply_to


class Timed:
    """A link over which time passes for each byte, and once for each answer."""

    def __init__(self, up_byte_s, down_byte_s, answer_s):
        self.now, self._took = 0.0, (up_byte_s, down_byte_s, answer_s)

    def send(self, frame):
        up, down, answer = self._took
        self.reply = reply_to(frame, 1 << 20)
        self.now += answer + up * len(frame.tensors["x"]) + down * len(self.reply.tensors["x"])

    def recv(self, timeout_s):
        return self.reply


@pytest.mark.parametrize("answer_s", [0.0, 0.02, 5.0])
def test_rates_of_both_ways_and_the_latency_are_told_apart(monkeypatch, answer_s):
    link = Timed(1e-5, 4e-5, answer_s)
    monkeypatch.setattr(link_rate.time, "perf_counter", lambda: link.now)
    found = measure(link, 1 << 19, 3, 1.0)
    assert found.up_bits_s == pytest.approx(8e5, rel=1e-3)
    assert found.down_bits_s == pytest.approx(2e5, rel=1e-3)
    assert found.latency_s == pytest.approx(answer_s / 2, abs=1e-4)
    assert found.nbytes == 3 * (2 * (1 << 19) + 2 + 2)


def test_what_passes_at_once_is_not_endlessly_fast(monkeypatch):
    """A token bucket let 64 kB through in the time of a byte: 1,000,000 Mbit/s were told of 50."""
    link = Timed(0.0, 0.0, 0.02)
    monkeypatch.setattr(link_rate.time, "perf_counter", lambda: link.now)
    assert measure(link, 1 << 16, 1, 1.0).up_bits_s == pytest.approx(8 * (1 << 16) / 0.005)


def test_an_answer_is_bounded_whatever_is_asked_for():
    from fedsys.transport.wire import Frame

    for asked, came in ((10**12, 64), (0, 1), (-3, 1), (7, 7)):
        assert len(reply_to(Frame("ask", {"reply": asked}), 64).tensors["x"]) == came
    assert reply_to(Frame("ask", {"reply": True}), 64) is None
    assert reply_to(Frame("activation"), 64) is None
