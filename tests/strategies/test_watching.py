"""How far a round is: counted where the work is done, and shown where the run was asked for."""

import io
import threading
import time

from fedsys.runs.progress import Silent
from fedsys.runtime.relay import Relay, Replay
from fedsys.training.pulse import Beat, Pulse
from strategies.watching import watched
from tests.waiting import until


class Heard(Silent):
    """Keeps what it is asked to show."""

    def __init__(self):
        self.within_, self.about_ = [], []

    def within(self, text):
        self.within_.append(text)

    def about(self, text):
        self.about_.append(text)


def test_clients_and_mini_batches_are_counted_from_all_threads():
    pulse = Pulse()
    pulse.begin(4, 400)

    def work():
        for _ in range(100):
            pulse.batch_done()
        pulse.client_done()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pulse.read() == Beat(asked=4, clients=4, expected=400, batches=400)
    pulse.begin(2, 10)
    assert pulse.read() == Beat(asked=2, expected=10)


def test_a_round_is_told_of_while_it_goes_on_and_not_before():
    pulse, heard = Pulse(), Heard()
    with watched(pulse, heard, look_s=0.01):
        time.sleep(0.05)
        assert heard.within_ == []
        pulse.begin(8, 100)
        pulse.client_done(3)
        until(lambda: "3 of 8 clients done" in heard.within_)
    count = len(heard.within_)
    time.sleep(0.05)
    assert len(heard.within_) == count


def test_a_run_elsewhere_is_told_of_here_but_not_at_every_look():
    stream, heard = io.StringIO(), Heard()
    relay = Relay(stream)
    relay.about("pi3 (clients 0 to 7)")
    for done in range(3):
        relay.within(f"{done} of 8 clients done")
    Replay(heard).feed(stream.getvalue())
    assert heard.about_ == ["pi3 (clients 0 to 7)"]
    assert heard.within_ == ["0 of 8 clients done"]
