"""``python -m fedsys.runtime.edge_nursery SOCKET NAME CORES``: forks workers of an edge server.

For `fedsys.runtime.edge_workers.EdgeWorkers`: each message over the socket brings another one, over
which a worker gets the pipes of its sessions. Ends when the socket is closed at the other end.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from typing import NoReturn

from fedsys.runtime import forks
from fedsys.runtime.processes import end_with_parent


def main() -> None:
    """Fork workers until the edge server is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the edge server decides what ends when
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the edge server sees who ends
    place, name, cores = sys.argv[1:]
    asked = socket.socket(fileno=int(place))
    from fedsys.offload import session_worker  # noqa: F401 - for the forks, which share it
    from fedsys.runtime.edge_workers import PID

    forks.settle()
    while (control := _received(asked)) is not None:
        pid = os.fork()
        if not pid:
            asked.close()
            _become(control, name, int(cores))
        control.close()
        asked.sendall(PID.pack(pid))
    os._exit(0)


def _become(control: socket.socket, name: str, cores: int) -> NoReturn:
    """Turn this fork into a worker; never returns."""
    status = 1
    try:
        end_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _work(control, name, cores)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # threads may be computing


def _work(control: socket.socket, name: str, cores: int) -> None:
    from fedsys.offload.emulation import Workers
    from fedsys.offload.session_worker import serve_session
    from fedsys.transport.frame_pipe import FramePipe

    workers = Workers(name, cores=cores)
    while (connection := _received(control)) is not None:
        threading.Thread(
            target=serve_session, args=(FramePipe(connection), workers), daemon=True
        ).start()


def _received(over: socket.socket) -> socket.socket | None:
    """Return the next socket that comes over another one; None if that is closed."""
    said, places, _, _ = socket.recv_fds(over, 1, 1)
    return socket.socket(fileno=places[0]) if said else None


if __name__ == "__main__":
    main()
