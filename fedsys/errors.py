"""Every error that fedsys raises on purpose, in one tree.

::

    FedsysError                 exit status 1: the job was understood and could not be done
    ├── ConfigError             exit status 2: an option, a group, or a value of the configuration
    ├── DataError               a data set or an image that cannot be read
    ├── ModelError              a model that cannot be built, traced, cut, pruned or loaded
    ├── RunError                a run folder that cannot be written, read or resumed
    ├── RuntimeFailure          Flower, a node or a process of the run failed
    │   └── PipelineLeft        a pipeline of hosts was taken down before it answered
    ├── SecurityError           a certificate, token or peer that is not accepted
    ├── RequestError            a request to the inference endpoint that cannot be answered
    ├── SessionError            a session that does not exist, or an operation out of its turn
    └── LinkError               the connection between a device and an edge server
        ├── FrameError          bytes that are not a valid frame
        ├── LinkTimeout         nothing arrived within the time limit
        ├── LinkClosed          the peer is gone
        │   └── LinkRefused     nobody accepts links at the address
        └── RemoteError         the peer answered with an error of its own

A message names the argument, its value, the rule that it breaks, and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeGuard


class FedsysError(Exception):
    """Base of all errors of this project; `exit_status` is that of the `fedsys` command."""

    exit_status = 1


class ConfigError(FedsysError):
    """An option, a group or a value of the configuration is not usable."""

    exit_status = 2

    @classmethod
    def of(cls, argument: str, value: object, rule: str, way_out: str = "") -> ConfigError:
        """Compose the one sentence that all configuration errors have.

        Args:
            argument: Name as the user writes it, for instance ``client.lr``.
            value: The value that was given.
            rule: What the value has to fulfil, beginning with "must".
            way_out: What to do instead; optional.
        """
        text = f"{argument}={value}: {rule}"
        return cls(f"{text}; {way_out}" if way_out else text)


class DataError(FedsysError):
    """A data set or one of its files cannot be read."""


class ModelError(FedsysError):
    """A model cannot be built, traced, cut, pruned or loaded."""


class RunError(FedsysError):
    """A run folder cannot be written, read or resumed."""


class RuntimeFailure(FedsysError):
    """Flower, a node, or a process that belongs to the run failed."""


class PipelineLeft(RuntimeFailure):
    """A pipeline was taken down on purpose before it answered: another one can be asked."""


class SecurityError(FedsysError):
    """A certificate, a token or a peer is not accepted."""


class RequestError(FedsysError):
    """A request to the inference endpoint cannot be answered.

    Args:
        status: What HTTP says of it, from 400 to 599.
        text: What is wrong, and the way out.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SessionError(FedsysError):
    """A session does not exist, or an operation is not the one that is due."""


class LinkError(FedsysError):
    """The connection between a device and an edge server failed."""


class FrameError(LinkError):
    """The bytes received are not a valid frame."""


class LinkTimeout(LinkError):
    """Nothing arrived within the time limit."""


class LinkClosed(LinkError):
    """The peer closed the connection, or it was lost."""


class LinkRefused(LinkClosed):
    """The address can be reached, and nobody accepts links there."""


class RemoteError(LinkError):
    """The peer answered with an error of its own."""


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a number, which a truth value is not.

    >>> is_number(1), is_number(0.5), is_number(True), is_number("1")
    (True, True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the closest of `known`, or an empty string.

    >>> did_you_mean("vgg6", ["vgg5", "resnet18"])
    "did you mean 'vgg5'? "
    >>> did_you_mean("zzz", ["vgg5"])
    ''
    """
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'? " if close else ""


def better_name(key: str, known: Iterable[str]) -> str:
    """Return ``did you mean …`` for an option that people know by another name, or nothing.

    Meant are options whose last word is the same, and those that abbreviate it: ``lr`` for
    ``learning_rate``.

    >>> better_name("client.learning_rate", ["client.lr", "client.device"])
    "did you mean 'client.lr'? "
    >>> better_name("epochs", ["client.epochs"])
    "did you mean 'client.epochs'? "
    """
    known = list(known)
    *outer, last = key.split(".")
    initials = "".join(word[0] for word in last.split("_") if word)
    names = [last, initials] if len(initials) > 1 else [last]
    meant = [
        name
        for wanted in names
        for name in known
        if name.rpartition(".")[2] == wanted and name != key
    ]
    if not meant:
        return did_you_mean(key, known)
    same = [name for name in meant if name.split(".")[:-1] == outer]
    common = [name for name in meant if name.startswith("client.")]
    return f"did you mean '{(same or common or meant)[0]}'? "


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------
# Packages that a device does without

EXTRA_OF = {
    "ray": "simulation",
    "matplotlib": "plots",
    "mpl_toolkits": "plots",
    "tensorboard": "tensorboard",
    "sklearn": "learn",
    "scipy": "learn",
    "torchvision": "vision",
    "PIL": "vision",
}
"""By package, the extra that brings it; ``fedsys[full]`` brings all of them."""


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; it is not imported for that."""
    try:
        return find_spec(package) is not None
    except (ValueError, ImportError):  # somebody keeps it from being imported
        return False


def need(package: str, who: str) -> None:
    """Ask for a package of an extra before the work begins that ends with it.

    Args:
        package: One of `EXTRA_OF`.
        who: Needs it.

    Raises:
        ModelError: It is not installed; names the extra.
    """
    if not is_installed(package):
        raise _lacking(package, who)


@contextmanager
def extras_named() -> Iterator[None]:
    """Turn the error of Python about a package of an extra into one that names the extra.

    Raises:
        ModelError: The block imports one that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRA_OF or is_installed(package):
            raise
        raise _lacking(package, "this") from error


def _lacking(package: str, who: str) -> ModelError:
    extra = EXTRA_OF[package]
    return ModelError(
        f"{who} needs the package {package}, which a device does without: install it by "
        f"pip install 'fedsys[{extra}]', or all that people and servers need by 'fedsys[full]'"
    )
