"""The ClientApp: one for all runtimes. A handler decodes, a client works, the handler encodes."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import mods, together
from clients.local import LocalClient
from clients.offload import OffloadClient
from fedsys import config as configuration
from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.faults import SPARED, Doom, to_json
from fedsys.identity import arithmetic
from fedsys.offload.dialling import Dialler, dialler_of
from fedsys.offload.link_probes import link_rate
from fedsys.planning.resources import Observation
from fedsys.runtime import zygote
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.transport import messages
from fedsys.transport.link_rate import LinkRate
from fedsys.transport.messages import (
    ASSIGNMENT,
    DATA_ROOT,
    FAULTS,
    FEDERATION,
    IDENTITY,
    OBSERVATION,
    PROBE,
    TRUNCATED,
    TRUNCATED_ROUND,
    Probe,
    Truncated,
)

_log = logging.getLogger("fedsys.clients")

app = ClientApp(mods=[mods.explain_errors, mods.unpack_arrays])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's own examples; reply with the model and what was seen."""
    doom = Doom.of(messages.of_kind(message.content, ConfigRecord).get(FAULTS))
    doom.reach("before")
    if ASSIGNMENT in message.content:
        dialler = _dialler(message, context, doom)
        reply = _offloaded(message, context, dialler).train(doom)
        if dialler.struck:
            reply[FAULTS] = ConfigRecord({messages.STRUCK: to_json(dialler.struck)})
    else:
        seen = _probed(message, context)
        reply = _client(message, context).train(message.content)
        _tell(reply, seen)
    doom.reach("after")
    return Message(reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the received model on the client's own examples."""
    if ASSIGNMENT in message.content:
        offloaded = _offloaded(message, context, _dialler(message, context))
        return Message(offloaded.evaluate(), reply_to=message)
    client = _client(message, context)
    return Message(client.evaluate(message.content), reply_to=message)


@app.query(TRUNCATED_ROUND.partition(".")[2])
def truncated_round(message: Message, context: Context) -> Message:
    """Train a few mini-batches, say what they took, and keep nothing of it."""
    content = message.content
    told = messages.read(Truncated, content.config_records.get(TRUNCATED, {}))
    if ASSIGNMENT in content:
        dialler = _dialler(message, context)
        reply = _offloaded(message, context, dialler).train(most=told.iterations)
    else:
        seen = _probed(message, context)
        reply = _client(message, context).train(content, most=told.iterations)
        _tell(reply, seen)
    return Message(RecordDict({OBSERVATION: reply[OBSERVATION]}), reply_to=message)


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Say which partition this node holds, how it computes, and of which classes its data are."""
    identity = messages.Identity(_partition(context), json.dumps(arithmetic()))
    if root := context.node_config.get(DATA_ROOT):
        classes = tuple(federation.federation(_config(message, context)).dataset.classes)
        identity = dataclasses.replace(identity, data_root=str(root), classes=classes)
    return Message(
        RecordDict({IDENTITY: ConfigRecord(messages.written(identity))}), reply_to=message
    )


def train_together(
    messages_: Sequence[Message], contexts: Sequence[Context]
) -> list[Message] | None:
    """Train many clients at once; None where that is not how these messages are answered.

    Whatever fails is tried again one by one, so that an error is that of its client.
    """
    if any(message.metadata.message_type != "train" for message in messages_):
        return None
    config = _config(messages_[0], contexts[0])
    try:
        replies = together.trained(
            config,
            [_partition(context) for context in contexts],
            [message.content for message in messages_],
        )
    except Exception:
        _log.debug("clients are trained one by one", exc_info=True)
        return None
    pairs = zip(replies, messages_, strict=True)
    return [Message(reply, reply_to=message) for reply, message in pairs]


def _probed(message: Message, context: Context) -> LinkRate | None:
    """Measure the link of a device that trains alone, if that is asked for; None: not done."""
    if (told := messages.of_kind(message.content, ConfigRecord).get(PROBE)) is None:
        return None
    probe = messages.read(Probe, told)
    return link_rate(probe.edges, probe.token, probe.nbytes, _dialler(message, context))


def _tell(reply: RecordDict, seen: LinkRate | None) -> None:
    """Say of a link what was measured of it."""
    if seen is not None:
        told = reply.config_records[OBSERVATION]
        more = dataclasses.replace(
            Observation.of(told),
            up_bit_s=1 / seen.up_bits_s, down_bit_s=1 / seen.down_bits_s, probe_bytes=seen.nbytes,
        )  # fmt: skip
        reply[OBSERVATION] = ConfigRecord({**told, **messages.written(more)})


def _client(message: Message, context: Context) -> LocalClient:
    return LocalClient(_config(message, context), _partition(context))


def _offloaded(message: Message, context: Context, dialler: Dialler) -> OffloadClient:
    config = _config(message, context)
    return OffloadClient(config, _partition(context), message.content, dialler)


def _dialler(message: Message, context: Context, doom: Doom = SPARED) -> Dialler:
    round_ = messages.settings_of(message.content).server_round
    return dialler_of(_config(message, context), context.node_config, doom.faults, round_)


def _config(message: Message, context: Context) -> Config:
    """Return the configuration of the run as it is for this node."""
    config = configuration.from_run_config(context.run_config)
    told = messages.of_kind(message.content, ConfigRecord).get(FEDERATION)
    num_clients = None if told is None else messages.read(messages.Division, told).num_clients
    root = context.node_config.get(DATA_ROOT)
    where = (str(root), _partition(context)) if root else None
    values = {"text": config.text, "num_clients": num_clients, "where": where}
    if zygote.ask_for(context.run_id, f"{__name__}:load_data", values):
        federation.forget()
    return _of_node(config, num_clients, where)


def _of_node(config: Config, num_clients: int | None, where: tuple[str, int] | None) -> Config:
    if num_clients is not None:
        config = configuration.divided(config, num_clients)
    return config if where is None else federation.own_data(config, *where)


def load_data(text: str, num_clients: int | None, where: tuple[str, int] | None) -> None:
    """Load the data of a run into a process that stays, and is forked for each message.

    Args:
        text: The configuration of the run.
        num_clients: Clients that it has in truth; None: as it says.
        where: The folder with the node's own data, and its partition id; None: it has none.
    """
    federation.forget()
    training.set_threads(1)  # else PyTorch has threads, which no fork would have
    federation.federation(_of_node(configuration.parse(text), num_clients, where))


def _partition(context: Context) -> int:
    partition = context.node_config.get(messages.PARTITION_ID)
    if not isinstance(partition, int) or partition < 0:
        raise ConfigError.of(
            messages.PARTITION_ID,
            partition,
            "must be a whole number of at least 0",
            "give each node its own: --node-config 'partition-id=0'",
        )
    return partition
