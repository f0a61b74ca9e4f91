"""The two Flower apps, which fedsys knows by name only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsys.config import Config
from fedsys.errors import ConfigError

_ONLY_LOOK = frozenset(
    {
        "clients.mods.explain_errors",
        "clients.mods.unpack_arrays",
        "flwr.clientapp.mod.comms_mods.message_size_mod",
        "flwr.clientapp.mod.comms_mods.arrays_size_mod",
    }
)

_PRIVATE = {
    "fixedclipping_mod": "it clips to a norm that only Flower's own wrapper tells it",
    "adaptiveclipping_mod": "it clips to a norm that only Flower's own wrapper tells it",
    "LocalDpMod": "its noise is for one round and an epsilon up to 1, by a sensitivity that need "
    "not be that of what it clips, and nobody adds rounds up",
}
"""Flower's mods for differential privacy, and why what they promise does not hold here."""


def load_apps(config: Config) -> tuple[ServerApp, ClientApp]:
    """Import the two apps by the names in the configuration.

    Raises:
        ConfigError: A name does not lead to an app of its kind.
    """
    server: ServerApp = _load("apps.server", config.apps.server, ServerApp)
    return server, load_client(config.apps.client)


def load_client(name: str) -> ClientApp:
    """Import the client app by its name, such as ``clients.app:app``.

    Raises:
        ConfigError: The name does not lead to a ClientApp.
    """
    app: ClientApp = _load("apps.client", name, ClientApp)
    return app


def load_together(config: Config) -> Callable[..., Any] | None:
    """Import what answers many messages at once: ``train_together``, beside the client app.

    Returns:
        It; None where each client trains alone.

    Raises:
        ConfigError: The client app's module has none.
    """
    if config.runtime.batched_clients == 1:
        return None
    module = importlib.import_module(config.apps.client.partition(":")[0])
    found: Callable[..., Any] | None = getattr(module, "train_together", None)
    if found is None:
        raise ConfigError.of(
            "runtime.batched_clients", config.runtime.batched_clients,
            f"needs a function train_together in {module.__name__}", "runtime.batched_clients=1",
        )  # fmt: skip
    return found


def check_mods(name: str) -> None:
    """Refuse mods of a client app that could not know that they see a part of the model only.

    A mod that clips, adds noise to, encrypts or compresses "the model" of a reply would do so to
    the device's half, with bounds that are meant for the whole. Flower's mods that only look are
    known; a mod of the user's own says of itself that it does, by ``my_mod.only_looks = True``.

    Args:
        name: Of the client app.

    Raises:
        ConfigError: There is such a mod; it is named.
    """
    for mod in load_client(name)._mods:
        path = _path_of(mod)
        if path in _ONLY_LOOK or getattr(mod, "only_looks", False):
            continue
        raise ConfigError.of(
            "apps.client", name,
            f"must not have the mod {path} with split training: it would see the device's part of "
            "the model for the whole",
            "use policy=none, or leave the mod away; one that changes no arrays says so by "
            "only_looks = True",
        )  # fmt: skip


def refuse_private_mods(name: str) -> None:
    """Refuse Flower's mods for differential privacy, in every run: what they spend is not known.

    Args:
        name: Of the client app.

    Raises:
        ConfigError: There is such a mod; it is named, with the reason.
    """
    for mod in load_client(name)._mods:
        reason = _PRIVATE.get(_path_of(mod).rpartition(".")[2])
        if reason and _path_of(mod).startswith("flwr."):
            raise ConfigError.of(
                "apps.client", name, f"must not have the mod {_path_of(mod)}: {reason}",
                "leave it away; privacy=client clips whole updates and accounts for them, with "
                "privacy.where=device on the devices",
            )  # fmt: skip


def _path_of(mod: Any) -> str:
    kind = mod if hasattr(mod, "__qualname__") else type(mod)
    return f"{kind.__module__}.{kind.__qualname__}"


def _load(key: str, name: str, kind: type[Any]) -> Any:
    module, _, attribute = name.partition(":")
    try:
        app = getattr(importlib.import_module(module), attribute or "app")
    except (ImportError, AttributeError) as error:
        raise ConfigError.of(key, name, f"cannot be imported ({error})") from error
    if not isinstance(app, kind):
        raise ConfigError.of(key, name, f"must name a Flower {kind.__name__}")
    return app
