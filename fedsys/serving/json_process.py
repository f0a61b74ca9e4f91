"""Large JSON is read in a process of its own: it would stop all threads of this one.

The parser of Python holds the interpreter for as long as it takes, half a second for 16 MiB, and
makes 32 bytes or more of every number. The process gives way to the one that answers, may take
`MEMORY_BYTES`, and gives the request back with a raw tensor. It has no code of strangers, no
PyTorch, and is started by the first request that needs it.

Both talk by pipes: a length of eight bytes and the body; back a status of four, two lengths of
eight, and so many bytes of JSON (or of the reason) and of the tensor.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, final

from fedsys.errors import RequestError
from fedsys.serving.tensor_json import with_raw_tensor

LARGE_BYTES = 131_072
"""JSON of more is read apart; less takes one or two milliseconds."""

MEMORY_BYTES = 1 << 30
"""Address space that the process may have."""

_ASKED = struct.Struct("<Q")
_SAID = struct.Struct("<IQQ")
_OK, _TOO_MUCH = 200, 413
_NICE = 10


@final
class JsonProcess:
    """Reads large JSON, one at a time.

    Args:
        input_shape: Of the model.
        max_rows: Images that a request may have.

    Attributes:
        done: How many it has read.
    """

    def __init__(self, input_shape: Sequence[int], max_rows: int) -> None:
        self._about = json.dumps([list(input_shape), max_rows])
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self.done = 0

    def read(self, body: bytes | bytearray) -> tuple[bytes, bytes]:
        """Return the request with a raw tensor: its JSON, and the bytes that follow it.

        Raises:
            RequestError: As reading it here would, or it takes too much memory.
        """
        with self._turn:
            process = self._process or self._start()
            try:
                status, head, raw = _ask(process, body)
            except (OSError, EOFError) as error:
                self._end()
                text = "the process that reads large JSON ended; send the tensor as raw bytes"
                raise RequestError(_TOO_MUCH, text) from error
            self.done += 1
        if status != _OK:
            raise RequestError(status, head.decode("utf-8", "replace"))
        if len(head) > LARGE_BYTES:
            raise RequestError(_TOO_MUCH, f"the JSON without data has {len(head):,} bytes")
        return head, raw

    def close(self) -> None:
        """End the process."""
        with self._turn:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedsys.serving.json_process", self._about],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the one that answers
        )  # fmt: skip
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # of what could not be sent
                        pipe.close()


def _ask(process: subprocess.Popen[bytes], body: bytes | bytearray) -> tuple[int, bytes, bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(_ASKED.pack(len(body)))
    process.stdin.write(body)
    process.stdin.flush()
    status, first, second = _SAID.unpack(_exactly(process.stdout, _SAID.size))
    return status, _exactly(process.stdout, first), _exactly(process.stdout, second)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError(f"{len(data)} of {size} bytes")
    return data


def _answer(body: bytes, input_shape: Sequence[int], max_rows: int) -> tuple[int, bytes, bytes]:
    try:
        return _OK, *with_raw_tensor(body, input_shape, max_rows)
    except RequestError as error:
        return error.status, str(error).encode("utf-8", "replace"), b""
    except MemoryError:
        return _TOO_MUCH, b"the JSON takes too much memory; send the tensor as raw bytes", b""


def main() -> None:
    """Answer until the other side closes the pipe."""
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    input_shape, max_rows = json.loads(sys.argv[1])
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(length := source.read(_ASKED.size)) == _ASKED.size:
        status, head, raw = _answer(_exactly(source, *_ASKED.unpack(length)), input_shape, max_rows)
        sink.write(_SAID.pack(status, len(head), len(raw)))
        sink.write(head)
        sink.write(raw)
        sink.flush()


if __name__ == "__main__":
    main()
