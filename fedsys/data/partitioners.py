"""Deal the examples of a training part to clients, as index arrays.

Every partitioner answers with an *owner array*: for each example the client that holds it, or
`NOBODY`. All are pure functions of (labels, number of clients, options, seed).

* ``iid``: shuffled and dealt out; sizes differ by one at most.
* ``dirichlet``: for each class, shares of the clients are drawn from Dir(α, …, α), and the
  examples of the class are cut by them (Yurochkin et al., 2019, "Bayesian Nonparametric Federated
  Learning of Neural Networks"). The amount of data per client varies with it. This is *not* the
  variant of Hsu et al. (2019), in which each client draws the mix of its classes and all hold
  equally much.
* ``shards``: sorted by label, cut into equal shards, each client gets some of them (McMahan et
  al., 2017, section 3).
* ``fractions``: the first clients hold the given fractions, the others share the rest equally.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from fedsys.data.dataset import Indices
from fedsys.data.options import Spec, choice, positive, whole
from fedsys.errors import ConfigError
from fedsys.randomness import Address

NOBODY = -1
"""Owner of an example that no client holds."""

_GROUP = "data.partition"
_LARGEST_ALPHA = 1e9  # beyond, the shares are equal to the last bit, and near 1e308 they overflow


def partition(labels: Indices, num_clients: int, spec: Spec, *, seed: int) -> list[Indices]:
    """Split the examples over clients.

    Args:
        labels: Labels of the training part, shape ``(N,)``.
        num_clients: Number of clients K.
        spec: Options of ``data.partition``: ``kind`` (iid, dirichlet, shards, fractions),
            ``alpha``, ``shards_per_client``, ``fractions`` and ``min_examples`` (1 if absent).
        seed: Seed of the run.

    Returns:
        K sorted index arrays without common elements. Together they hold every example, except
        when fractions for all clients sum to less than one.

    Raises:
        ConfigError: An option is out of its range, or there are too few examples for all clients.
    """
    labels = np.asarray(labels)
    if isinstance(num_clients, bool) or not isinstance(num_clients, int) or num_clients < 1:
        raise ConfigError.of("num_clients", num_clients, "must be a whole number of at least 1")
    kind = choice(f"{_GROUP}.kind", spec.get("kind", "iid"), tuple(_PARTITIONERS))
    least = whole(spec, "min_examples", 1, group=_GROUP)
    if num_clients * least > len(labels):
        raise ConfigError.of(
            "num_clients",
            num_clients,
            f"must be at most {len(labels) // least}, because {len(labels)} training examples "
            f"are to give each client at least {least}",
            f"lower num_clients or {_GROUP}.min_examples, or take more data",
        )
    rng = Address(seed).numpy("partition")
    owner = _PARTITIONERS[kind](labels, num_clients, spec, rng)
    if kind == "dirichlet":
        _repair(owner, num_clients, least, rng)
    parts = _by_owner(owner, num_clients)
    smallest = min(range(num_clients), key=lambda client: len(parts[client]))
    if len(parts[smallest]) < least:
        raise ConfigError.of(
            f"{_GROUP}.kind",
            kind,
            f"must leave at least {least} examples for each client, and leaves "
            f"{len(parts[smallest])} for client {smallest}",
            f"change the fractions, lower num_clients or {_GROUP}.min_examples",
        )
    return parts


def _by_owner(owner: Indices, num_clients: int) -> list[Indices]:
    order = np.argsort(owner, kind="stable").astype(np.int64)
    bounds = np.searchsorted(owner[order], np.arange(num_clients + 1))
    return [order[bounds[k] : bounds[k + 1]] for k in range(num_clients)]


def _iid(labels: Indices, num_clients: int, spec: Spec, rng: np.random.Generator) -> Indices:
    owner = np.empty(len(labels), dtype=np.int64)
    owner[rng.permutation(len(labels))] = np.arange(len(labels)) % num_clients
    return owner


def _dirichlet(labels: Indices, num_clients: int, spec: Spec, rng: np.random.Generator) -> Indices:
    alpha = positive(spec, "alpha", 0.5, most=_LARGEST_ALPHA, group=_GROUP)
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        counts = np.diff(cuts, prepend=0, append=len(members))
        owner[members] = np.repeat(np.arange(num_clients), counts)
    return owner


def _repair(owner: Indices, num_clients: int, least: int, rng: np.random.Generator) -> None:
    """Move examples one by one from the largest client to those below `least`, in place.

    Drawing again until all are satisfied, as others do, never ends for small α and many clients.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    needy = np.flatnonzero(sizes < least)
    if not len(needy):
        return
    parts = _by_owner(owner, num_clients)
    donors = [(-int(size), client) for client, size in enumerate(sizes) if size > least]
    heapq.heapify(donors)
    stock: dict[int, list[int]] = {}
    for client in needy:
        for _ in range(least - int(sizes[client])):
            size, donor = heapq.heappop(donors)
            if donor not in stock:
                stock[donor] = rng.permutation(parts[donor]).tolist()
            owner[stock[donor].pop()] = client
            if -size - 1 > least:
                heapq.heappush(donors, (size + 1, donor))


def _shards(labels: Indices, num_clients: int, spec: Spec, rng: np.random.Generator) -> Indices:
    per_client = whole(spec, "shards_per_client", 2, group=_GROUP)
    shards = num_clients * per_client
    if shards > len(labels):
        raise ConfigError.of(
            f"{_GROUP}.shards_per_client",
            per_client,
            f"must be at most {len(labels) // num_clients}, because {len(labels)} training "
            f"examples are cut into shards for {num_clients} clients",
        )
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    holder = rng.permutation(np.repeat(np.arange(num_clients), per_client))
    owner = np.empty(len(labels), dtype=np.int64)
    owner[by_label] = holder[np.arange(len(labels)) * shards // len(labels)]
    return owner


def _fractions(labels: Indices, num_clients: int, spec: Spec, rng: np.random.Generator) -> Indices:
    given = _checked_fractions(spec.get("fractions"), num_clients)
    cuts = np.rint(np.cumsum(given) * len(labels)).astype(np.int64)
    rest = int(len(labels) - cuts[-1])
    others = num_clients - len(given)
    shared = [rest // others + (k < rest % others) for k in range(others)]
    counts = np.concatenate([np.diff(cuts, prepend=0), np.array(shared, dtype=np.int64)])
    owner = np.full(len(labels), NOBODY, dtype=np.int64)
    shuffled = rng.permutation(len(labels))
    owner[shuffled[: counts.sum()]] = np.repeat(np.arange(num_clients), counts)
    return owner


def _checked_fractions(value: object, num_clients: int) -> list[float]:
    argument = f"{_GROUP}.fractions"
    items = list(value) if isinstance(value, list | tuple) else []
    numbers = [float(f) for f in items if isinstance(f, int | float) and not isinstance(f, bool)]
    if not numbers or len(numbers) != len(items) or not all(0.0 < f <= 1.0 for f in numbers):
        raise ConfigError.of(
            argument, value, "must be a list of numbers above 0 and at most 1", "for instance [0.5]"
        )
    if len(numbers) > num_clients:
        raise ConfigError.of(
            argument, value, f"must have at most one fraction for each of {num_clients} clients"
        )
    if sum(numbers) > 1.0 + 1e-9:
        raise ConfigError.of(argument, value, f"must sum to at most 1, not {sum(numbers):g}")
    return numbers


_PARTITIONERS: dict[str, Callable[[Indices, int, Spec, np.random.Generator], Indices]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "fractions": _fractions,
}
