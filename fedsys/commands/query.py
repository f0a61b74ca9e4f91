"""``fedsys query``: ask an endpoint what is on an image, or on all images of a folder."""

from __future__ import annotations

import http.client
import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fedsys import config as configuration
from fedsys.config import Config
from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError, DataError, RequestError, RuntimeFailure
from fedsys.serving import v2

SUFFIXES = (".png", ".jpg", ".jpeg")
_PAUSE_S = 0.1

OWN = ("address", "name", "timeout_s", "wait_s")
"""Options of ``serving`` that count for who asks; the others are of the endpoint."""

HOW = ("technique", "way", "cuts", "again")
"""What a chain says of how it answered."""


def job(tree: Any) -> Mapping[str, Any]:
    """Send images to an endpoint and print what it says.

    Args:
        tree: The composed configuration (a DictConfig), of which ``input`` and ``serving`` count.

    Returns:
        For one image: ``class``, ``probabilities`` by class, ``variant``, ``ms``. For a folder:
        ``results``, a list of these with ``file``, or with ``error`` for a file that was refused;
        ``ok`` is false if there was one.

    Raises:
        ConfigError: There is no such image.
        RequestError: The endpoint refuses the only image.
        RuntimeFailure: There is no endpoint.
    """
    config = configuration.parse(configuration.to_text(tree))
    for key, text in configuration.given().items():
        if key.startswith("serving.") and key.removeprefix("serving.") not in OWN:
            reason = "the endpoint decides on it; give it to fedsys serve portfolio=DIR"
            print(f"note: {text} is without effect: {reason}", file=sys.stderr)
    files, single = _files(config)
    results = []
    with closing(_connect(config.serving)) as connection:
        for file in files:
            try:
                result = ask(connection, config.serving, file.read_bytes())
            except RequestError as error:
                if single:
                    raise RequestError(error.status, f"{file}: {error}") from error
                result = {"error": str(error)}
            except OSError as error:
                if isinstance(error, ConnectionError) or not _unreadable(file):
                    raise _lost(config.serving, error) from error
                raise DataError(f"{file}: cannot be read: {error.strerror}") from error
            results.append({"file": str(file), **result})
            if not config.json:
                print(_line(file, result), flush=True)
    if single:
        return results[0]
    return {"results": results, "ok": not any("error" in row for row in results)}


def _files(config: Config) -> tuple[list[Path], bool]:
    if not config.input:
        raise ConfigError.of("input", config.input, "must name an image or a folder of images")
    place = Path(config.input).expanduser()
    if place.is_file():
        return [place], True
    if not place.is_dir():
        raise ConfigError.of("input", config.input, "must be an image or a folder that exists")
    files = sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ConfigError.of("input", config.input, f"must hold images ({' '.join(SUFFIXES)})")
    return files, False


def _unreadable(file: Path) -> bool:
    try:
        file.open("rb").close()
    except OSError:
        return True
    return False


def _lost(options: ServingConfig, error: Exception) -> RuntimeFailure:
    return RuntimeFailure(f"the endpoint at {options.address} is lost: {error or type(error)}")


def _connect(options: ServingConfig) -> http.client.HTTPConnection:
    """Connect, and wait until the endpoint is ready.

    Raises:
        ConfigError: The address has another form.
        RuntimeFailure: It is not ready in time.
    """
    parts = urlsplit(options.address)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError.of("serving.address", options.address, "must be http://host:port")
    connection = http.client.HTTPConnection(
        parts.hostname, parts.port or 80, timeout=options.timeout_s
    )
    until = time.monotonic() + options.wait_s
    waiting = False
    while True:
        try:
            connection.request("GET", f"/v2/models/{options.name}/ready")
            response = connection.getresponse()
            body = response.read()
            if response.status == 404:
                raise RequestError(404, _error_of(body))
            if response.status == 200:
                return connection
            reason = f"it answers {response.status}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        connection.close()
        if time.monotonic() >= until:
            raise RuntimeFailure(
                f"no endpoint is ready at {options.address} ({reason}); "
                "start one by fedsys serve portfolio=DIR, or name another by serving.address="
            )
        if not waiting:
            waiting = True
            print(f"waiting for {options.address}", file=sys.stderr)
        time.sleep(_PAUSE_S)


def ask(
    connection: http.client.HTTPConnection, options: ServingConfig, data: bytes
) -> dict[str, Any]:
    """Ask about one image file.

    Returns:
        ``class``, ``probabilities``, ``variant``, ``meets_objective`` and ``ms``, the time from
        the request to the answer in milliseconds; of a chain also `HOW` it answered.

    Raises:
        RequestError: The endpoint refuses it; with the endpoint's words.
        RuntimeFailure: What it answers is not of the protocol.
    """
    raw = struct.pack("<I", len(data)) + data
    head = json.dumps({
        "inputs": [{"name": v2.INPUT, "datatype": "BYTES", "shape": [1],
                    "parameters": {"binary_data_size": len(raw)}}],
        "outputs": [{"name": v2.PROBABILITIES,
                     "parameters": {"binary_data": False, "classification": 1 << 20}}],
    }).encode()  # fmt: skip
    start = time.perf_counter()
    headers = {v2.HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    connection.request("POST", f"/v2/models/{options.name}/infer", head + raw, headers)
    response = connection.getresponse()
    body = response.read()
    took = (time.perf_counter() - start) * 1e3
    if response.status != 200:
        raise RequestError(response.status, _error_of(body))
    try:
        tree = json.loads(body)
        ranked = [text.split(":", 2) for text in tree["outputs"][0]["data"]]
        found = {name: float(np.float32(value)) for value, _, name in ranked}
        about = tree["parameters"]
        by, meets = about["variant"], about.get("meets_objective")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        text = f"the endpoint at {options.address} answers what is not of the protocol: {error!r}"
        raise RuntimeFailure(text) from error
    return {
        "class": ranked[0][2],
        "probabilities": found,
        "variant": by,
        "meets_objective": meets,
        "ms": round(took, 3),
        **{key: about[key] for key in HOW if key in about},
    }


def _error_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _line(file: Path, result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"{file}: {result['error']}"
    best: Iterator[tuple[str, float]] = iter(list(result["probabilities"].items())[:3])
    shares = ", ".join(f"{name} {share:.1%}" for name, share in best)
    how = ""
    if "technique" in result:
        way = result["way"] if result["way"] not in ("whole", result["variant"]) else ""
        how = f" by {result['technique']} {way}".rstrip() if result["technique"] != "none" else ""
        how += f", cuts {result['cuts']}" + (", sent anew" if result["again"] else "")
    return f"{file}: {shares}  ({result['variant']}{how}, {result['ms']:.1f} ms)"
