"""Coverage-guided fuzzing of the frame parser; needs `atheris`, which the suite does not.

Run ``python tests/fuzz/fuzz_wire.py -max_total_time=600 CORPUS_DIR``. A frame that parses must
encode to a frame that parses again; anything but FrameError is a finding.

Checksums would hide everything behind them from a fuzzer, so only the first byte of an input says
whether the rest is taken as it is. Else the rest is a header and a payload around which a correct
preamble is put. There the header is JSON, which mutates better than MessagePack; it is turned into
that, with the right checksums of tensors if it is a table of such. What is no JSON stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import sys
import zlib
from pathlib import Path

import atheris
import msgpack

with atheris.instrument_imports(include=["fedsys.transport.wire", "fedsys.transport.tensors"]):
    from fedsys.errors import FrameError
    from fedsys.transport.wire import (
        _CRC_AT,
        _PREAMBLE,
        ALIGNMENT,
        MAGIC,
        VERSION,
        Assembler,
        Frame,
        Limits,
        checksum,
        decode,
        encode,
    )

LIMITS = Limits(frame_bytes=1 << 20, tensor_bytes=1 << 20, tensors=64, header_bytes=1 << 14)


def one_input(data: bytes) -> None:
    """Parse an input, in one piece and in two."""
    if not data:
        return
    raw = data[1:] if data[0] % 4 == 0 else framed(data[1:])
    whole, halves = parsed(raw), parsed(raw[: len(raw) // 2], raw[len(raw) // 2 :])
    assert (whole is None) == (halves is None)
    if whole is None:
        return
    again = decode(encode(whole), limits=LIMITS)
    assert again.kind == whole.kind
    assert list(again.tensors) == list(whole.tensors)
    assert [t.stride() for t in again.tensors.values()] == [
        t.stride() for t in whole.tensors.values()
    ]


def parsed(*pieces: bytes) -> Frame | None:
    assembler, frame = Assembler(LIMITS), None
    try:
        for piece in pieces:
            frame = assembler.feed(piece)
    except FrameError:
        return None
    return frame


def framed(data: bytes) -> bytes:
    """Return a frame around a header and a payload, which a null byte divides."""
    header, _, payload = data.partition(b"\0")
    header = summed(header, payload)
    stated = _PREAMBLE.pack(MAGIC, VERSION, 0, len(header), len(payload), 0)[:_CRC_AT]
    return stated + zlib.crc32(header, zlib.crc32(stated)).to_bytes(4, "little") + header + payload


def summed(header: bytes, payload: bytes) -> bytes:
    """Return a header of JSON as MessagePack, with the right checksums of its tensors."""
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        return header
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
        start = 0
        for entry in fields["tensors"]:
            entry[5] = checksum(payload[start : start + entry[4]])
            start += entry[4] + -entry[4] % ALIGNMENT
    try:
        packed: bytes = msgpack.packb(fields)
    except (ValueError, OverflowError):  # lone surrogates, integers of more than 64 bits
        return header
    return packed


def seeds(folder: Path) -> None:
    """Write inputs to begin with, if there are none."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    image = torch.ones(2, 3, 4, 4)
    frames = [
        Frame("hello", {"session": "s", "token": "t"}),
        Frame("activation", {"step": 1}, {"x": image, "labels": torch.arange(2)}),
        Frame("gradient", {}, {"x": image.contiguous(memory_format=torch.channels_last)}),
        Frame("state", {}, {"flag": torch.tensor([True]), "n": torch.tensor(3), "e": image[:0]}),
    ]
    for number, frame in enumerate(frames):
        data = encode(frame)
        header = _PREAMBLE.unpack_from(data)[3]
        cut = _PREAMBLE.size + header
        (folder / f"raw-{number}").write_bytes(b"\0" + data)
        inner = (
            json.dumps(msgpack.unpackb(data[_PREAMBLE.size : cut])).encode() + b"\0" + data[cut:]
        )
        (folder / f"framed-{number}").write_bytes(b"\1" + inner)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seeds(Path(argument))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
