"""Split training: sessions on edge servers, who holds them, and the device's end.

An `EdgeServer` holds a `Session` for each device that offloads: its part of the model, the
optimizer of that, and its place in the dialogue. The server app opens, moves and closes them by its
`Fleet`; a device trains with one by its `Remote`, whatever becomes of links and servers.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "EdgeClient",
    "EdgeServer",
    "Fleet",
    "Remote",
    "Session",
    "SessionSpec",
    "Snapshot",
    "open_fleet",
]

if TYPE_CHECKING:
    from fedsys.offload.edge import EdgeServer
    from fedsys.offload.edge_client import EdgeClient
    from fedsys.offload.fleet import Fleet
    from fedsys.offload.opening import open_fleet
    from fedsys.offload.remote import Remote
    from fedsys.offload.session import Session
    from fedsys.offload.snapshot import SessionSpec, Snapshot
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "edge": "EdgeServer",
            "edge_client": "EdgeClient",
            "fleet": "Fleet",
            "opening": "open_fleet",
            "remote": "Remote",
            "session": "Session",
            "snapshot": "SessionSpec Snapshot",
        },
    )
