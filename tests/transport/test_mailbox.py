import threading

import pytest

from fedsys.errors import LinkClosed, LinkTimeout
from fedsys.transport import mailbox
from fedsys.transport.mailbox import RELAXED_FACTOR, Mailbox

SOON = 30.0


def test_what_is_larger_than_the_bound_passes_one_at_a_time():
    """While its own side sent, every second item above eight times the bound ended the link."""
    box = Mailbox[int](10)

    def put():
        for number in range(50):
            box.put(number, 1_000)

    with box.relaxed():
        putter = threading.Thread(target=put, daemon=True)
        putter.start()
        assert [box.get(SOON) for _ in range(50)] == list(range(50))
        putter.join(SOON)


def test_where_nobody_takes_anything_a_relaxed_mailbox_ends_the_wait(monkeypatch):
    monkeypatch.setattr(mailbox, "STALLED_S", 0.05)
    box = Mailbox[int](10)
    with box.relaxed():
        for number in range(RELAXED_FACTOR):
            box.put(number, 10)
        with pytest.raises(LinkClosed, match="both ends send and neither receives: 80 bytes"):
            box.put(8, 10)
    assert [box.get(SOON) for _ in range(RELAXED_FACTOR)] == list(range(RELAXED_FACTOR))


def test_a_mailbox_that_ends_wakes_who_waits_for_room():
    box, failed = Mailbox[int](10), []
    box.put(0, 10)

    def put():
        try:
            box.put(1, 10)
        except LinkClosed as error:
            failed.append(str(error))

    putter = threading.Thread(target=put, daemon=True)
    putter.start()
    box.end(LinkClosed("enough"))
    putter.join(SOON)
    assert failed == ["enough"]
    assert box.get(SOON) == 0
    with pytest.raises(LinkClosed, match="enough"):
        box.get(SOON)


def test_an_empty_mailbox_says_how_long_it_was_waited_for():
    with pytest.raises(LinkTimeout, match=r"nothing arrived within 0\.01 s"):
        Mailbox[int](10).get(0.01)
