"""What is secret in a configuration, and what is done so that it stays so: known in one place.

Two kinds differ in what can be done about them:

* **Control tokens** (`TOKENS`) are given anew with each start. In every text of a run, in all that
  is written from it and in what is sent to other processes stands `MASK` instead. They come from
  a file, from the environment or from the command line (`control_token`).
* **Values of the user's own groups** whose names say that they are secret (``model.api_key``) are
  needed to build the same again, so they stand in the run's own ``config.yaml`` and ``run.json``,
  which are then readable by their owner only (`is_private`), and nowhere else (`public`).

Paths of credentials are no secrets: their files are protected where they are.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from fedsys.errors import ConfigError

MASK: Final = "***"
"""What stands instead of a secret."""

TOKENS: Final = (
    *("edge.control_token", "fleet.control_token"),
    *("host.control_token", "hosts.control_token"),
)
"""Options that hold a token."""

VARIABLE: Final = "FEDSYS_CONTROL_TOKEN"
"""Environment variable that holds the token of both sides."""

_NAMES: Final = re.compile(
    r"(?i)(^|_)(token|password|passwd|passphrase|secret|(api|access|private|secret)_?key)s?$"
)
_IN_ADDRESS: Final = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+(?=@)")


class _HasToken(Protocol):
    @property
    def control_token(self) -> str: ...
    @property
    def control_token_file(self) -> str | None: ...


def is_secret(key: str) -> bool:
    """Return whether an option, with or without the groups before it, holds a secret.

    >>> [is_secret(key) for key in ("fleet.control_token", "model.api_key", "model.token_dim")]
    [True, True, False]
    """
    return bool(_NAMES.search(key.rpartition(".")[2]))


def without_tokens(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with `MASK` for its control tokens; the others are as they were."""
    result = dict(tree)
    for key in TOKENS:
        group, _, name = key.partition(".")
        inner = result.get(group)
        if isinstance(inner, Mapping) and inner.get(name):
            result[group] = {**inner, name: MASK}
    return result


def public(value: Any) -> Any:
    """Return a configuration, or a part of one, with `MASK` for every secret: to be passed on."""
    if isinstance(value, Mapping):
        return {k: _shown(str(k), inner) for k, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    return _IN_ADDRESS.sub(rf"\g<1>{MASK}", value) if isinstance(value, str) else value


def _shown(key: str, value: Any) -> Any:
    return MASK if value and isinstance(value, str) and is_secret(key) else public(value)


def is_private(tree: Mapping[str, Any]) -> bool:
    """Return whether a configuration holds secrets besides control tokens."""
    rest = without_tokens(tree)
    return bool(_listed(public(rest)) != _listed(rest))


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _listed(inner) for k, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


@contextmanager
def out_of(file: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Mask what overrides tell in a file that somebody else writes in the block.

    Until the end of the block it, and all else that is made, is readable by its owner only.

    Args:
        file: May be absent.
        overrides: As ``key=value``; those whose key is no secret do not count.
    """
    pairs = [override.partition("=")[::2] for override in overrides]
    hidden = [part for key, value in pairs if is_secret(key) for part in value.split(",") if part]
    if not hidden:
        yield
        return
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            for value in sorted(hidden, key=len, reverse=True):
                text = text.replace(value.strip("'\""), MASK)
            file.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Control tokens


def control_token(config: _HasToken, group: str) -> str:
    """Return the token of one side: from the option, its file, or the environment; empty for none.

    Args:
        config: The group ``edge``, ``fleet``, ``host`` or ``hosts``.
        group: Its name, for messages.

    Raises:
        ConfigError: The file cannot be read or holds none; or the run had a token, which is not
            kept with it, and there is none now.
    """
    if config.control_token and config.control_token != MASK:
        return config.control_token
    if config.control_token_file is not None:
        return _from_file(Path(config.control_token_file).expanduser(), group)
    token = os.environ.get(VARIABLE, "").strip()
    if not token and config.control_token == MASK:
        raise ConfigError.of(
            f"{group}.control_token", MASK, "was given at the start, and is not kept with a run",
            f"give it again: {group}.control_token_file=FILE, or {VARIABLE} in the environment",
        )  # fmt: skip
    return token


def _from_file(path: Path, group: str) -> str:
    key = f"{group}.control_token_file"
    way_out = "(umask 077; openssl rand -hex 32 > FILE) makes one"
    try:
        token = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError.of(key, path, f"cannot be read ({reason})", way_out) from error
    if not token:
        raise ConfigError.of(key, path, "must hold a token", way_out)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        print(f"warning: {path} can be read by others; chmod 600 {path}", file=sys.stderr)
    return token


def warn_of(given: Iterable[str]) -> None:
    """Say of tokens on the command line that everybody on this machine can read them.

    Args:
        given: Options that the command line names.
    """
    for key in sorted(set(given) & set(TOKENS)):
        print(
            f"warning: {key}= can be read by every user of this machine while this process runs; "
            f"use {key}_file=FILE, or {VARIABLE} in the environment",
            file=sys.stderr,
        )


@contextmanager
def handed_on(token: str) -> Iterator[None]:
    """Let a server app that reads the run's text find a token: in this process or a child of it.

    Args:
        token: Empty or `MASK` for none.
    """
    if token in ("", MASK):
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = token
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
