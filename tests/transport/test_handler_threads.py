"""Threads of handlers begin and end in any order."""

import threading

from fedsys.transport.link import HandlerThreads


class SilentLink:
    ended = True

    def close(self):
        pass


def test_a_server_may_stop_while_a_link_is_given_to_its_handler(monkeypatch):
    """Whoever stopped at that moment joined a thread that had not started, which is an error."""
    handlers = HandlerThreads("memory://here", lambda link: None, 4)
    at_start, problems = threading.Event(), []

    class SlowToStart(threading.Thread):
        def start(self):
            at_start.set()
            stopping.join(0.3)  # as long as a thread would take whose lock is held
            super().start()

    def stop():
        at_start.wait(60)
        try:
            handlers.stop(1.0)
        except RuntimeError as error:
            problems.append(error)

    stopping = threading.Thread(target=stop)
    stopping.start()
    monkeypatch.setattr("fedsys.transport.link.threading.Thread", SlowToStart)
    handlers.admit(None)
    handlers.start(SilentLink())
    stopping.join(60)
    assert not stopping.is_alive()
    assert not problems
