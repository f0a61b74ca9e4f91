"""What a controller may have an edge server call.

Before, it was any `_target_`: whoever had the token had the rights of the edge server.
"""

from pathlib import Path

import pytest

from fedsys.config import CONF
from fedsys.config.values import OWN_MODELS
from fedsys.errors import SecurityError
from fedsys.models.catalog import torchvision_names
from fedsys.offload.edge_models import check_models


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "fedsys.files.write_atomic",
        "fedsys.modelsx.evil",
        "torchvision.datasets.utils.download_url",
        "fedsys.models.construct.seeded_default_generator",  # imported there, defined elsewhere
        "torchvision.models.resnet.partial",
        "",
    ],
)
def test_what_is_not_named_is_refused_by_its_name(target):
    with pytest.raises(SecurityError, match=r"edge\.models=\[…") as raised:
        check_models({"_target_": target}, OWN_MODELS)
    assert f"model._target_={target}:" in str(raised.value)


def test_nothing_is_imported_before_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "loud.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SecurityError, match=r"loud\.Net"):
        check_models({"_target_": "loud.Net"}, OWN_MODELS)


@pytest.mark.parametrize(
    "inner", [{"head": {"_target_": "os.system"}}, {"a": [{"b": {"_target_": "os.system"}}]}]
)
def test_what_is_within_a_model_is_looked_at_too(inner):
    with pytest.raises(SecurityError, match=r"os\.system"):
        check_models({"_target_": "fedsys.models.small.cnn", **inner}, OWN_MODELS)


def test_all_models_of_the_product_and_of_torchvision_are_admitted():
    import yaml

    for file in sorted(Path(CONF, "model").glob("*.yaml")):
        if file.stem != "own":  # which names none
            check_models(yaml.safe_load(file.read_text()), OWN_MODELS)
    for name in torchvision_names():
        check_models({"_target_": f"torchvision.models.{name}"}, OWN_MODELS)


def test_the_owner_admits_a_package_or_one_constructor():
    check_models({"_target_": "collections.OrderedDict"}, ["collections"])
    check_models({"_target_": "json.decoder.JSONDecoder"}, ["json"])
    check_models({"_target_": "os.system"}, ["os.system"])  # defined in posix, and named wholly
    with pytest.raises(SecurityError):
        check_models({"_target_": "os.system"}, ["os"])


def test_losses_and_metrics_are_called_as_models_are_built_by_permission_alone():
    """A loss stands on the edge server: its path would have been a way around ``edge.models``."""
    with pytest.raises(SecurityError, match=r"task\._target_=os\.system: this edge server"):
        check_models([{"_target_": "os.system"}, None], OWN_MODELS, "task")
    check_models(["mse", None], OWN_MODELS, "task")
    check_models([{"_target_": "tests.own_work.steep"}, "mae"], ["tests.own_work"], "task")
