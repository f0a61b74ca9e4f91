"""Many tiny clients in one message each, trained at once (``runtime.batched_clients``)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flwr.app import RecordDict

from clients.local import LocalClient, observation, own_batches, train_metrics
from fedsys.config import Config
from fedsys.planning.resources import Measured
from fedsys.randomness import Address
from fedsys.training import optimizers, together
from fedsys.training import plain as training
from fedsys.training.tasks import task_of
from fedsys.transport import messages, records


def trained(
    config: Config, partitions: Sequence[int], contents: Sequence[RecordDict]
) -> list[RecordDict]:
    """Train clients of one round at once; return what each replies.

    Args:
        config: The run, which `fedsys.training.together.check_config` has nothing against.
        partitions: The clients' partition ids.
        contents: What each received, as `LocalClient.train`.
    """
    began = time.perf_counter()
    device = training.pick_device(config.client.device)
    model = LocalClient(config, partitions[0]).model()
    settings = messages.settings_of(contents[0])
    client, round_ = config.client, settings.server_round
    lr = optimizers.learning_rate(client.lr, client.lr_schedule, round_, config.rounds)
    results = together.train(
        model,
        [
            {n: t.to(device) for n, t in records.from_record(
                content.array_records[messages.ARRAYS]).items()} for content in contents
        ],
        [
            ((x.to(device), y.to(device)) for x, y in
             own_batches(config, k, Address(config.seed, k, round_)))
            for k in partitions
        ],
        lambda parameters: optimizers.make_optimizer(parameters, client, lr),
        proximal_mu=settings.proximal_mu,
        task=task_of(config),
    )  # fmt: skip
    seconds = (time.perf_counter() - began) / len(partitions)
    replies = []
    for partition, (state, score) in zip(partitions, results, strict=True):
        iteration_s = seconds / score.steps if score.steps else 0.0
        measured = Measured(iteration_s=iteration_s)
        replies.append(
            RecordDict(
                {
                    messages.ARRAYS: records.to_record(state),
                    messages.METRICS: train_metrics(score, config, partition, seconds),
                    messages.OBSERVATION: observation(score.steps, seconds, measured),
                }
            )
        )
    return replies
