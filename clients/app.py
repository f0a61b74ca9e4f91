"""The ClientApp: one for all runtimes. A handler decodes, a client works, the handler encodes."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.local import LocalClient
from fedsys import config as configuration

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's own examples; reply with the model and what was seen."""
    client = _client(context)
    return Message(client.train(message.content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the client's own examples."""
    client = _client(context)
    return Message(client.evaluate(message.content), reply_to=message)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds."""
    identity = ConfigRecord({"partition-id": _partition(context)})
    return Message(RecordDict({"identity": identity}), reply_to=message)


def _client(context: Context) -> LocalClient:
    return LocalClient(configuration.from_run_config(context.run_config), _partition(context))


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])
