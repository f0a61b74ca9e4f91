"""Exchange the normalisation of any model: BatchNorm, deferred BatchNorm, GroupNorm or none.

BatchNorm's statistics mix the examples of a batch and, averaged over clients with unlike data, fit
none of them (Hsieh et al., "The Non-IID Data Quagmire of Decentralized Machine Learning", ICML
2020, section 5); per-example clipping does not even allow it. GroupNorm (Wu and He, "Group
Normalization", ECCV 2018) looks at one example at a time and keeps no statistics.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsys.errors import ConfigError, did_you_mean
from fedsys.models.batchnorm import DeferredBatchNorm

NORMS = ("batch", "deferred", "group", "none")

_MOST_GROUPS = 32
_FEWEST_CHANNELS = 4


def groups_for(channels: int) -> int:
    """Return the number of groups for `channels`: the largest divisor within two bounds.

    At most 32 groups, the paper's default, and at least four channels in each: a group of one
    channel on a map of one pixel would be normalised to zero.
    """
    most = max(1, min(_MOST_GROUPS, channels // _FEWEST_CHANNELS))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def convert_norm(model: nn.Module, norm: str) -> nn.Module:
    """Replace every BatchNorm in `model`, in place, and return the model.

    All other modules keep their names. A GroupNorm takes over epsilon, scale and shift of the
    BatchNorm it replaces, a deferred BatchNorm everything.

    Args:
        model: Any model, with or without BatchNorm.
        norm: ``"batch"`` leaves the model as it is, ``"deferred"`` lets running statistics be
            those of mini-batches (`fedsys.models.batchnorm`), ``"group"`` puts a GroupNorm in
            place of each BatchNorm, ``"none"`` an identity.

    Raises:
        ConfigError: For any other `norm`.
    """
    if norm not in NORMS:
        hint = did_you_mean(str(norm), NORMS)
        raise ConfigError.of("model.norm", norm, f"must be one of {', '.join(NORMS)}", hint.strip())
    if norm == "batch":
        return model
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _BatchNorm):
            continue
        if norm == "deferred" and module.running_mean is None:
            continue  # no statistics to defer
        if module not in replaced:
            replaced[module] = _replacement(module, norm).train(module.training)
        if not name:
            return replaced[module]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replaced[module])
    return model


def _replacement(module: _BatchNorm, norm: str) -> nn.Module:
    if norm == "deferred":
        return DeferredBatchNorm.like(module)
    return _group_norm(module) if norm == "group" else nn.Identity()


def _group_norm(batch_norm: _BatchNorm) -> nn.GroupNorm:
    channels = batch_norm.num_features
    group_norm = nn.GroupNorm(
        groups_for(channels), channels, eps=batch_norm.eps, affine=batch_norm.affine
    )
    if batch_norm.affine:
        group_norm.weight = nn.Parameter(batch_norm.weight.detach().clone())
        group_norm.bias = nn.Parameter(batch_norm.bias.detach().clone())
    return group_norm
