"""What leaks: images of activations, labels of gradients, members of models; and ε from all.

* ``cuts``: at every cut, with and without each mechanism, what a trained inverse network makes of
  activations (SSIM and PSNR with the victims' images), and how well labels are told by activation
  gradients, and by activations without them. The row of cut 0 is an attacker that sees nothing.
* ``models``: who was trained on, told by the final model: by the loss, and by likelihood ratios;
  and a lower bound on ε by what it gives away of canaries, images with wrong labels that were in by
  a coin (`fedsys.privacy.audit_epsilon`).
* ``releases``: a lower bound on ε by telling two activations apart by what is released of them.

Every bound stands beside the claim that it must not exceed; ``holds`` says whether all do.
``leakage.json`` is what ``policy.leakage=`` takes, ``plots/reconstructions.png`` the picture.

Attackers are strong: they have images of the same kind and the parameters of the device's units,
and take the mean of all releases of an activation, as if the device's units had not changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsys.commands.bench import Chart
from fedsys.commands.bench.leakage_mechanisms import (
    AuditClients,
    fit_client,
    fit_cut,
    fit_label,
    fit_record,
)
from fedsys.commands.bench.leakage_models import (
    Fit,
    Pool,
    Setting,
    accuracy_of,
    fit_plain,
    losses_of,
    make_pool,
    say,
)
from fedsys.commands.bench.leakage_pictures import draw_reconstructions
from fedsys.config import Config
from fedsys.data import Dataset
from fedsys.errors import ConfigError
from fedsys.files import write_atomic
from fedsys.models.layers import LayeredModel, layered, split
from fedsys.planning.leakage import FILE, unit_list
from fedsys.privacy.audit_canaries import canary_bound, release_bound, response_bound
from fedsys.privacy.audit_inversion import Inversion, invert, mean_image
from fedsys.privacy.audit_labels import gradients_of, infer_labels
from fedsys.privacy.audit_membership import by_loss, confidences, likelihood_ratio
from fedsys.privacy.audit_metrics import pixels_of
from fedsys.privacy.cut import cut_noise
from fedsys.privacy.labels import randomised
from fedsys.privacy.noise import Addressed
from fedsys.privacy.release import Noise, clipped
from fedsys.randomness import Address
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import layered_model

MECHANISMS = ("none", "record", "client", "cut", "label")

Row = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What all attacks share.

    Attributes:
        config: The run.
        options: Of the benchmark.
        dataset: Its data.
        pool: Who is in which model.
    """

    config: Config
    options: Mapping[str, Any]
    dataset: Dataset
    pool: Pool

    def number(self, key: str) -> int:
        """Return an option that counts something."""
        return int(self.options[key])

    def noise(self, epsilon: float) -> Noise:
        """Return the noise at the cut with which all releases of an example spend ε."""
        o = self.options
        return cut_noise(
            epsilon, float(o["delta"]), float(o["clip_norm"]), self.number("epochs"),
            kind=str(o["noise"]),
        )  # fmt: skip

    def normalised(self, images: Tensor) -> Tensor:
        """Return images from 0 to 1 as the model takes them."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.dataset.mean, self.dataset.std))
        return (images - mean) / std


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Attack.

    Args:
        config: Data, model and client.
        options: As in ``conf/bench/leakage.yaml``.

    Returns:
        ``cuts``, ``models``, ``releases``; ``ssim_first_cut``, ``ssim_blind`` (of the mean image),
        ``accuracy`` without a mechanism, and ``holds``: whether no lower bound on ε is above its
        claim.

    Raises:
        ConfigError: An option is not usable.
    """
    training.set_threads(config.client.threads)
    dataset = federation.federation(config).dataset
    audit = Audit(config, options, dataset, make_pool(dataset, options, config.seed))
    settings = _settings(options)
    models: list[Row] = []
    first: dict[str, nn.Module] = {}
    for setting in settings:
        row, first[setting.label] = _model_row(audit, setting)
        models.append(row)
    cuts, inversions = _cut_rows(audit, settings, first)
    releases = [found for setting in settings if (found := _release_row(audit, setting))]
    _leave(audit, cuts, inversions)
    claims = [row for row in (*models, *releases) if row["claim"] is not None]
    open_ = [row for row in cuts if row["mechanism"] == "none"]
    return {
        "accuracy": models[0]["accuracy"],
        "ssim_blind": next(row["ssim"] for row in open_ if row["cut"] == 0),
        "ssim_first_cut": next(row["ssim"] for row in open_ if row["cut"] > 0),
        "holds": all(row["epsilon_at_least"] <= row["claim"] for row in claims),
        "cuts": cuts,
        "models": models,
        "releases": releases,
    }


def _settings(options: Mapping[str, Any]) -> list[Setting]:
    asked = list(options["mechanisms"])
    for mechanism in asked:
        if mechanism not in MECHANISMS:
            raise ConfigError.of(
                "bench.mechanisms", mechanism, f"must be of {', '.join(MECHANISMS)}"
            )
    found = [Setting("none")]
    for mechanism in (m for m in MECHANISMS[1:] if m in asked):
        key = "label_epsilons" if mechanism == "label" else "epsilons"
        found += [Setting(mechanism, float(epsilon)) for epsilon in options[key]]
    return found


# --------------------------------------------------------------------------------------------------
# Models: who was in


def _model_row(audit: Audit, setting: Setting) -> tuple[Row, nn.Module]:
    """Train the models of a mechanism; return what they tell, and the first of them."""
    size = audit.number("client_size") if setting.mechanism == "client" else 1
    pool = audit.pool.of_clients(size)
    members, fit = pool.members, _fit_of(audit, setting)
    losses, right, first = [], [], None
    for index in range(len(members)):
        say(f"{setting.label}: model {index + 1} of {len(members)}")
        model = fit(pool.of_model(index), index)
        first = first or model
        losses.append(losses_of(model, pool.images, audit.dataset))
        right.append(accuracy_of(model, audit.dataset.test, audit.dataset))
    assert first is not None  # there are two models at least
    # Of a client, the mean loss of its images
    seen = np.stack(losses).reshape(len(members), -1, size).mean(2)
    row: Row = {
        "mechanism": setting.mechanism,
        "claim": setting.epsilon if setting.mechanism in ("record", "client") else None,
        "epsilon": setting.epsilon,
        "accuracy": float(np.mean(right)),
    }
    found = _membership(seen, members[:, ::size], pool.examples // size, audit)
    return row | found, first


def _membership(
    losses: NDArray[np.float64], members: NDArray[np.bool_], count: int, audit: Audit
) -> Row:
    """Return how well members are told, and a bound on ε.

    Args:
        losses: ``(models, units)``: of examples or clients, canaries behind the first `count`.
        members: Likewise.
        count: Units that are no canaries.
        audit: Gives δ.
    """
    loss = by_loss(losses[:, :count], members[:, :count])
    row: Row = {"loss_auc": loss.auc, "loss_tpr": loss.tpr}
    if len(members) >= 4:
        ratio = likelihood_ratio(confidences(losses[:, :count]), members[:, :count])
        row |= {"ratio_auc": ratio.auc, "ratio_tpr": ratio.tpr}
    delta = float(audit.options["delta"])
    row["epsilon_at_least"] = canary_bound(-losses[:, count:], members[:, count:], delta)
    return row


def _fit_of(audit: Audit, setting: Setting) -> Fit:
    config, options, dataset = audit.config, audit.options, audit.dataset
    epochs, epsilon = audit.number("epochs"), setting.epsilon
    if epsilon is None:
        return fit_plain(config, dataset, epochs)
    claimed = epsilon, float(options["delta"])
    if setting.mechanism == "record":
        return fit_record(config, dataset, epochs, claimed, float(options["record_clip_norm"]))
    if setting.mechanism == "client":
        size = audit.number("client_size")
        clients = AuditClients(
            len(audit.pool.images) // size, size, epochs, float(options["client_clip_norm"])
        )
        return fit_client(config, dataset, claimed, clients)
    if setting.mechanism == "label":
        return fit_label(config, dataset, epochs, epsilon)
    return fit_cut(config, dataset, epochs, options["cut"], audit.noise(epsilon))


def _release_row(audit: Audit, setting: Setting) -> Row | None:
    """Return a bound on ε by what leaves a device; None where that is a model."""
    address, trials = Address(audit.config.seed), audit.number("trials")
    if setting.epsilon is None or setting.mechanism not in ("cut", "label"):
        return None
    row: Row = {"mechanism": setting.mechanism, "claim": setting.epsilon}
    if setting.mechanism == "label":
        bound = response_bound(setting.epsilon, audit.dataset.num_classes, trials, address)
        return row | {"noise": "response", "releases": 1, "epsilon_at_least": bound}
    noise, delta = audit.noise(setting.epsilon), float(audit.options["delta"])
    bound = release_bound(noise, audit.number("epochs"), delta, trials, address)
    return row | {
        "noise": noise.kind,
        "multiplier": noise.multiplier,
        "releases": audit.number("epochs"),
        "epsilon_at_least": bound,
    }


# --------------------------------------------------------------------------------------------------
# Cuts: images and labels

Inversions = list[tuple[str, Inversion]]


def _cut_rows(
    audit: Audit, settings: Sequence[Setting], models: Mapping[str, nn.Module]
) -> tuple[list[Row], Inversions]:
    victims = pixels_of(audit.pool.victims(audit.number("victims")).pixels)
    known = pixels_of(audit.pool.known)
    blind = mean_image(known, victims)
    rows: list[Row] = [_cut_row(Setting("none"), 0, "nothing is seen", blind)]
    inversions: Inversions = [("images", Inversion(victims, 1.0, float("inf")))]
    for setting in (s for s in settings if s.mechanism != "label"):  # it touches no activation
        # At the cut, the model of no mechanism: what is measured is what clipping and noise hide
        model = models["none" if setting.mechanism == "cut" else setting.label]
        chain = layered(model, audit.dataset.input_shape)
        for cut in _cuts_of(chain):
            front, back = (half.eval() for half in split(chain, cut))
            seen = _Seen(audit, front, setting)
            address = Address(audit.config.seed)
            epochs, width = audit.number("invert_epochs"), audit.number("width")
            found = invert(seen.of, known, victims, address, epochs=epochs, width=width)
            row = _cut_row(setting, cut, chain.units[cut - 1].name, found)
            rows.append(row | _label_figures(audit, seen, back))
            inversions.append((f"{setting.label}, cut {cut}", found))
            say(f"{setting.label}, cut {cut} ({row['after']}): SSIM {row['ssim']:.3f}")
    return rows, inversions


def _cuts_of(chain: LayeredModel) -> list[int]:
    """Return every cut at which there is something to look at: also those that save nothing."""
    tied = {c for users in chain.shared.values() for c in range(users[0] + 1, users[-1] + 1)}
    return [c for c in range(1, len(chain)) if c not in tied and chain.units[c - 1].out_shape]


def _cut_row(setting: Setting, cut: int, after: str, found: Inversion) -> Row:
    return {
        "mechanism": setting.mechanism,
        "epsilon": setting.epsilon,
        "cut": cut,
        "after": after,
        "ssim": found.ssim,
        "psnr": found.psnr,
    }


class _Seen:
    """What an edge server sees of images at a cut.

    With noise at the cut it is the mean of all releases: each example is released in every epoch.
    """

    def __init__(self, audit: Audit, front: nn.Module, setting: Setting) -> None:
        self._audit, self._front = audit, front
        protected = setting.mechanism == "cut" and setting.epsilon is not None
        self._noise = audit.noise(setting.epsilon or 0.0) if protected else None

    def of(self, images: Tensor, purpose: str) -> Tensor:
        """Return what is seen of images from 0 to 1; `purpose` says which, for the noise.

        With noise, numbers of about 1, whatever the scale of activations: networks learn from such.
        """
        z = self.released(images, self._audit.number("epochs"), purpose)
        if self._noise is None:
            return z
        return z * (math.sqrt(z[0].numel()) / self._noise.clip_norm)

    @torch.no_grad()
    def released(self, images: Tensor, releases: int, purpose: str) -> Tensor:
        """Return the mean of some releases, as the edge's units take it."""
        parts = torch.split(self._audit.normalised(images), 500)
        z: Tensor = torch.cat([self._front(part) for part in parts])
        if self._noise is None:
            return z
        source, noise = Addressed(Address(self._audit.config.seed)), torch.zeros_like(z)
        for release in range(releases):
            noise += self._noise.draw(source, f"audit {purpose}", release, z.shape)
        return clipped(z, self._noise) + noise / releases


def _label_figures(audit: Audit, seen: _Seen, back: nn.Module) -> Row:
    """Return how well labels are told, at a cut, by gradients and by activations.

    With randomised response gradients are those of the labels that it told.
    """
    images, classes = audit.pool.images, audit.dataset.num_classes
    count = audit.pool.examples
    x, y = pixels_of(images.pixels[:count]), images.labels[:count]
    z = seen.released(x, 1, "labels")
    by_activation = infer_labels(seen.of(x, "labels"), y.numpy(), classes)

    def by_gradient(told: Tensor) -> float:
        return infer_labels(gradients_of(back, z, told), y.numpy(), classes)

    row: Row = {"label_auc": by_gradient(y), "label_auc_activations": by_activation}
    for epsilon in audit.options["label_epsilons"]:
        told = randomised(y, float(epsilon), classes, Address(audit.config.seed))
        row[f"label_auc_at_{epsilon:g}"] = by_gradient(told)
    return row


# --------------------------------------------------------------------------------------------------
# What is left


def _leave(audit: Audit, cuts: Sequence[Row], inversions: Inversions) -> None:
    """Write the file for ``policy.leakage`` and the picture into the run folder."""
    folder = Path(str(audit.config.run.dir))
    shape = audit.dataset.input_shape
    kept = ("mechanism", "epsilon", "cut", "after", "ssim", "psnr", "label_auc")
    told = {
        "version": 1,
        "data": audit.dataset.name,
        "units": unit_list(layered_model(audit.config, shape, audit.dataset.num_classes)),
        "cuts": [{key: row.get(key) for key in kept} for row in cuts if row["cut"]],
    }
    write_atomic(folder / FILE, json.dumps(told, indent=1).encode())
    count = audit.number("pictures")
    strips = [(name, found.images[:count], found.ssim) for name, found in inversions]
    draw_reconstructions(folder / "plots" / "reconstructions.png", strips)


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the similarity of reconstructions at each cut, with and without each mechanism."""
    rows = figures["cuts"]
    cuts = sorted({row["cut"] for row in rows if row["cut"]})
    after = {row["cut"]: row["after"] for row in rows}
    series: dict[str, NDArray[np.float64]] = {}
    for row in rows:
        if row["cut"]:
            name = Setting(row["mechanism"], row["epsilon"]).label
            series.setdefault(name, np.full(len(cuts), np.nan))[cuts.index(row["cut"])] = row[
                "ssim"
            ]
    blind = float(figures["ssim_blind"])
    named = {name: [float(v) for v in values] for name, values in series.items()}
    return Chart(
        "Images from activations by an inverse network",
        "cut",
        "SSIM with the victims' images",
        [f"{cut} {after[cut]}" for cut in cuts],
        {**named, "mean image": [blind] * len(cuts)},
    )
