"""The ClientApp: one for all runtimes. A handler decodes, a client works, the handler encodes."""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import mods
from clients.local import LocalClient
from clients.offload import OffloadClient
from fedsys import config as configuration
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.faults import SPARED, Doom, to_json
from fedsys.identity import arithmetic
from fedsys.offload.dialling import Dialler, dialler_of
from fedsys.training import federation

app = ClientApp(mods=[mods.explain_errors, mods.unpack_arrays])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's own examples; reply with the model and what was seen."""
    doom = Doom.of(message.content.config_records.get("faults"))
    doom.reach("before")
    if "assignment" in message.content:
        dialler = _dialler(message, context, doom)
        reply = _offloaded(message, context, dialler).train(doom)
        if dialler.struck:
            reply["faults"] = ConfigRecord({"struck": to_json(dialler.struck)})
    else:
        reply = _client(message, context).train(message.content)
    doom.reach("after")
    return Message(reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the client's own examples."""
    if "assignment" in message.content:
        offloaded = _offloaded(message, context, _dialler(message, context))
        return Message(offloaded.evaluate(), reply_to=message)
    client = _client(message, context)
    return Message(client.evaluate(message.content), reply_to=message)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds, how it computes, and of which classes its data are."""
    identity = ConfigRecord({"partition-id": _partition(context)})
    identity["arithmetic"] = json.dumps(arithmetic())
    if root := context.node_config.get("data-root"):
        classes = federation.federation(_config(message, context)).dataset.classes
        identity.update({"data-root": str(root), "classes": list(classes)})
    return Message(RecordDict({"identity": identity}), reply_to=message)


def _client(message: Message, context: Context) -> LocalClient:
    return LocalClient(_config(message, context), _partition(context))


def _offloaded(message: Message, context: Context, dialler: Dialler) -> OffloadClient:
    config = _config(message, context)
    return OffloadClient(config, _partition(context), message.content, dialler)


def _dialler(message: Message, context: Context, doom: Doom = SPARED) -> Dialler:
    return dialler_of(_config(message, context), context.node_config, doom.faults)


def _config(message: Message, context: Context) -> Config:
    """Return the configuration of the run as it is for this node."""
    config = configuration.from_run_config(context.run_config)
    if (told := message.content.config_records.get("federation")) is not None:
        config = configuration.divided(config, int(str(told["num-clients"])))
    if root := context.node_config.get("data-root"):
        config = federation.own_data(config, str(root), _partition(context))
    return config


def _partition(context: Context) -> int:
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int) or partition < 0:
        raise ConfigError.of(
            "partition-id",
            partition,
            "must be a whole number of at least 0",
            "give each node its own: --node-config 'partition-id=0'",
        )
    return partition
