"""From a body to what a model takes, wherever that disturbs others least."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import final

from prometheus_client.core import CounterMetricFamily, Metric

from fedsys.config.serving import ServingConfig
from fedsys.serving import v2
from fedsys.serving.engine import Card
from fedsys.serving.images import decode, normalise
from fedsys.serving.json_process import LARGE_BYTES, JsonProcess
from fedsys.serving.tensor_json import refuse

_IMAGES = ("image/png", "image/jpeg")
_AT_ONCE = 32_768  # bytes of an image that are read without a thread: handing over takes longer
_MOST_THREADS = 4  # each may decode an image of `images.MAX_PIXELS`


@final
class Reader:
    """Reads bodies: small ones at once, others in a few threads, large JSON in a process.

    Args:
        card: Of the model.
        options: Limits.
    """

    def __init__(self, card: Card, options: ServingConfig) -> None:
        self._card, self._options = card, options
        self._known = v2.known_heads(card, options.max_rows)
        self._json = JsonProcess(card.input_shape, options.max_rows)
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "read")
        self._one = ThreadPoolExecutor(1, "json")

    async def read(self, headers: Mapping[str, str], body: bytes | bytearray) -> v2.Inference:
        """Return the request that a body holds.

        Args:
            headers: Of the request; their names in any case.
            body: Of the request.

        Raises:
            RequestError: With the status that HTTP has for it.
        """
        is_image = _is_image(headers)
        few = _AT_ONCE if is_image else LARGE_BYTES
        if len(body) < few and not self._options.resize:  # a small file may be a large image
            return self._read(headers, body, is_image)
        loop = asyncio.get_running_loop()
        if not is_image:
            length = headers.get(v2.HEADER_LENGTH)
            if length is None and len(body) > LARGE_BYTES:
                head, raw = await loop.run_in_executor(self._one, self._json.read, body)
                headers, body = {v2.HEADER_LENGTH: str(len(head))}, head + raw
            elif length is not None and length.isdecimal() and int(length[:18]) > LARGE_BYTES:
                refuse(f"{v2.HEADER_LENGTH}: {length[:30]}: must be at most {LARGE_BYTES}", 413)
        return await loop.run_in_executor(self._threads, self._read, headers, body, is_image)

    def _read(
        self, headers: Mapping[str, str], body: bytes | bytearray, is_image: bool
    ) -> v2.Inference:
        card, resize = self._card, self._options.resize
        if is_image:
            pixels = decode(bytes(body), card, resize=resize)
            return v2.Inference(normalise(pixels[None], card))
        length = headers.get(v2.HEADER_LENGTH)
        return v2.read(
            body, length, card,
            max_rows=self._options.max_rows, resize=resize, known=self._known,
        )  # fmt: skip

    def collect(self) -> Iterator[Metric]:
        """Yield what Prometheus is told."""
        yield CounterMetricFamily(
            "fedsys_serving_json_apart", "Large JSON bodies, read by a process of their own.",
            value=self._json.done,
        )  # fmt: skip

    def close(self) -> None:
        """End threads and process."""
        self._threads.shutdown()
        self._one.shutdown()
        self._json.close()


def _is_image(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() in _IMAGES
