"""The machine: everything of fedsys but the choice of strategies and clients.

``fedsys.train()``, ``plan``, ``prune``, ``serve`` and ``load`` do from Python what the commands do
(`fedsys.commands.python`); importing them costs nothing until they are called.

Its folders are rooms with an order (``docs/architecture.md``). What a room offers stands in the
``__all__`` of its ``__init__``; the names are imported when they are first asked for (`face`), so
that a room costs no more than what is taken from it.
"""

import sys

TYPE_CHECKING = False
"""As that of `typing`, whose import costs what a room does: type checkers take it for true."""

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__version__ = "0.1.0"
"""That of ``pyproject.toml``, also where fedsys is not installed but shipped in Flower's bundle."""


def face(
    room: str, names: "Mapping[str, str]"
) -> "tuple[Callable[[str], object], Callable[[], list[str]]]":
    """Return ``__getattr__`` and ``__dir__`` of a room whose names are imported late (PEP 562).

    A name must not be that of a module of the room: whoever imports the module first would make
    the room's attribute the module, and ``from room import name`` would depend on the past.

    Args:
        room: The package, its ``__name__``.
        names: For each of its modules, relative to it, the names that it lends, spaced.
    """
    module_of = {
        name: f"{room}.{module}" for module, lent in names.items() for name in lent.split()
    }

    def getattribute(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(module_of[name]), name)
        setattr(sys.modules[room], name, value)  # from now on an attribute like any other
        return value

    def names_in_room() -> list[str]:
        return sorted({*vars(sys.modules[room]), *module_of})

    return getattribute, names_in_room


__all__ = [
    "FinishedRun",
    "PlannedRun",
    "ServedModel",
    "load",
    "plan",
    "prune",
    "serve",
    "train",
]

__getattr__, __dir__ = face(__name__, {"commands.python": " ".join(__all__)})
