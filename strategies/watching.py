"""Says how far a round is while it goes on, as nobody who works on it has the time to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedsys.runs.lines import within_text
from fedsys.runs.progress import Progress
from fedsys.training.pulse import Pulse

LOOK_S: Final = 1.0
"""Seconds from one look to the next."""


@contextmanager
def watched(pulse: Pulse, progress: Progress, look_s: float = LOOK_S) -> Iterator[None]:
    """Show how far rounds are as long as the block lasts.

    Args:
        pulse: What is known of the round.
        progress: Decides whether it is shown.
        look_s: Seconds from one look to the next.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(look_s):
            beat = pulse.read()
            if beat.asked:
                progress.within(within_text(beat.clients, beat.asked, beat.batches, beat.expected))

    thread = threading.Thread(target=look, name="watches-rounds", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
