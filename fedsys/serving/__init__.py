"""Answering requests over HTTP, whatever computes the answers.

An `Engine` turns images into scores; `Endpoint` puts HTTP around one. `PortfolioEngine` answers
with one variant of a portfolio and changes it as `decide` says, without losing a request.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Answer",
    "Batcher",
    "Card",
    "Endpoint",
    "Engine",
    "PortfolioEngine",
    "decide",
]

if TYPE_CHECKING:
    from fedsys.serving.batching import Batcher
    from fedsys.serving.engine import Answer, Card, Engine
    from fedsys.serving.http import Endpoint
    from fedsys.serving.portfolio import PortfolioEngine
    from fedsys.serving.switch.policy import decide
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "batching": "Batcher",
            "engine": "Answer Card Engine",
            "http": "Endpoint",
            "portfolio": "PortfolioEngine",
            "switch.policy": "decide",
        },
    )
