"""The two Flower apps, which fedsys knows by name only."""

from __future__ import annotations

import importlib
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsys.config import Config
from fedsys.errors import ConfigError


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


def _load(key: str, name: str, kind: type[Any]) -> Any:
    module, _, attribute = name.partition(":")
    try:
        app = getattr(importlib.import_module(module), attribute or "app")
    except (ImportError, AttributeError) as error:
        raise ConfigError.of(key, name, f"cannot be imported ({error})") from error
    if not isinstance(app, kind):
        raise ConfigError.of(key, name, f"must name a Flower {kind.__name__}")
    return app
