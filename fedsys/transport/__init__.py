"""How tensors travel: links, the frames on them, who may speak, and Flower's records.

A `Link` carries `Frame` after `Frame`, in order and whole, between threads (``memory://``), or over
TCP or gRPC with TLS; `serve` and `dial` are its two ends. `Network` says how fast one is, as a
value. The room knows tensors and no run: neither models nor configuration.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "CODECS",
    "Authority",
    "Credentials",
    "Frame",
    "Link",
    "Network",
    "decode_activation",
    "dial",
    "encode_activation",
    "serve",
]

if TYPE_CHECKING:
    from fedsys.transport.addresses import dial, serve
    from fedsys.transport.codecs import CODECS, decode_activation, encode_activation
    from fedsys.transport.link import Link
    from fedsys.transport.network import Network
    from fedsys.transport.security import Authority, Credentials
    from fedsys.transport.wire import Frame
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "addresses": "dial serve",
            "codecs": "CODECS decode_activation encode_activation",
            "link": "Link",
            "network": "Network",
            "security": "Authority Credentials",
            "wire": "Frame",
        },
    )
