"""The ClientApp: one for all runtimes. A handler decodes, a client works, the handler encodes."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import mods
from clients.local import LocalClient
from clients.offload import OffloadClient
from fedsys import config as configuration
from fedsys.faults import Doom
from fedsys.link import dial

app = ClientApp(mods=[mods.explain_errors, mods.unpack_arrays])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's own examples; reply with the model and what was seen."""
    doom = Doom.of(message.content.config_records.get("faults"))
    doom.reach("before")
    if "assignment" in message.content:
        reply = _offloaded(message, context).train()
    else:
        reply = _client(context).train(message.content)
    doom.reach("after")
    return Message(reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the client's own examples."""
    if "assignment" in message.content:
        return Message(_offloaded(message, context).evaluate(), reply_to=message)
    client = _client(context)
    return Message(client.evaluate(message.content), reply_to=message)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
    identity = ConfigRecord({"partition-id": _partition(context)})
    return Message(RecordDict({"identity": identity}), reply_to=message)


def _client(context: Context) -> LocalClient:
    return LocalClient(configuration.from_run_config(context.run_config), _partition(context))


def _offloaded(message: Message, context: Context) -> OffloadClient:
    config = configuration.from_run_config(context.run_config)
    return OffloadClient(config, _partition(context), message.content, dial)


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])
