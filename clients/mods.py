"""What surrounds every handler of the ClientApp.

Flower calls a mod with a message, the node's context, and the next mod or handler.
"""

from __future__ import annotations

import os
import traceback

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode

from fedsys.errors import extras_named
from fedsys.transport import packing


def explain_errors(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer with the error's own words where a handler raises, the same in all runtimes.

    Flower would pass on what its engine makes of it: a quoted traceback under Ray, and nothing
    but the name of a class elsewhere. With FEDSYS_TRACEBACK set there is a traceback as well.
    """
    try:
        with extras_named():
            return call_next(message, context)
    except Exception as error:  # whatever it is, it ends this client's part of the round only
        reason = f"{type(error).__name__}: {error}"
        if os.environ.get("FEDSYS_TRACEBACK"):
            reason = f"{reason}\n{traceback.format_exc()}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def unpack_arrays(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Unpack the content of a packed message, and pack the reply to it."""
    if not packing.is_packed(message):
        return call_next(message, context)
    message.content = packing.unpack(message.content)
    reply = call_next(message, context)
    if reply.has_content():
        reply.content = packing.pack(reply.content)
    return reply
