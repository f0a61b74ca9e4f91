"""Sets of flwr-datasets, from a cache that is made here as the libraries make it."""

import json

import numpy as np
import pytest
import torch

from fedsys.data import load
from fedsys.errors import ConfigError, DataError, is_installed
from fedsys.main import main
from fedsys.training.federation import federation

pytestmark = pytest.mark.skipif(
    not (is_installed("flwr_datasets") and is_installed("datasets")), reason="needs flwr_datasets"
)
NAME, SEEN = "tests/mini", 41


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return the folder of a cache as it is after the sets were loaded once from the network."""
    from tests import flwr_cache  # imports pandas and seaborn, which every worker would

    assert (flwr_cache.NAME, flwr_cache.SEEN) == (NAME, SEEN)
    return flwr_cache.make(str(tmp_path_factory.mktemp("hf")))


def spec(cache, **more):
    return {"source": "flwr_datasets", "name": NAME, "cache": cache, **more}


def test_images_come_in_the_order_of_the_set_with_its_classes_and_its_test_part(cache):
    found = load(spec(cache, client="site"), seed=0)
    assert found.classes == ("even", "odd") and found.input_shape == (1, 12, 12)
    assert (len(found.train), len(found.test)) == (SEEN, 9)
    assert found.train.pixels[:, 0, 3, 3].tolist() == list(range(SEEN))
    assert found.train.labels.tolist() == [k % 2 for k in range(SEEN)]
    assert found.train.owners.tolist() == [k % 3 for k in range(SEEN)]
    small = load(spec(cache, channels=3, size=8), seed=0)
    assert small.input_shape == (3, 8, 8)
    two = load(spec(cache, inputs=["image", "age"], target="label"), seed=0)
    assert two.input_shape == (("float32", 1, 12, 12), ("int64",))


def test_columns_of_numbers_are_a_table_and_a_part_is_set_aside_where_there_is_none(cache):
    chosen = {"inputs": ["age", "label"], "target": "mass", "test_split": "none", "test": 0.25}
    found = load(spec(cache, task="regression", **chosen), seed=0)
    assert (len(found.train), len(found.test)) == (31, 10) and found.input_shape == (2,)
    both = torch.cat([found.train.pixels, found.test.pixels])[:, 0].sort().values
    assert both.tolist() == list(range(SEEN))
    assert torch.equal(found.train.labels[:, 0], found.train.pixels[:, 0] / 2)


def test_examples_may_be_made_by_a_function_and_padded_by_another(cache):
    made = {"example": "tests.own_work.words_of_row", "collate": "tests.own_work.padded"}
    found = load(spec(cache, **made), seed=0)
    assert found.input_shape == (3,) and found.train.pixels.dtype == torch.int64
    assert found.train.pixels[4].tolist() == [4, 4, 0] and found.num_classes == 2


@pytest.mark.filterwarnings("ignore:Specifying null_placement")  # pyarrow of its caller
def test_clients_are_those_of_a_column_or_of_a_partitioner(cache, configure):
    """flwr-datasets' shards leave rows out: these belong to nobody, and all others to one."""
    given = ["data=flwr_datasets", f"data.name={NAME}", f"data.cache={cache}",
             "data.partition.kind=client_ids", "data.validation=0"]  # fmt: skip
    fed = federation(configure(*given, "data.client=site", "num_clients=3"))
    assert [len(part) for part in fed.parts] == [14, 14, 13]
    shards = (
        "data.partitioner={_target_: flwr_datasets.partitioner.ShardPartitioner, num_partitions: 4,"
        " partition_by: label, num_shards_per_partition: 2, shard_size: 4}"
    )
    fed = federation(configure(*given, shards, "num_clients=4"))
    together = np.concatenate(fed.parts)
    assert [len(part) for part in fed.parts] == [8] * 4 and len(set(together)) == 32 < SEEN


def test_the_command_trains_on_a_set_by_its_name(cache, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ("data=flwr_datasets", f"data.name={NAME}", f"data.cache={cache}", "json=true")
    own = ("data.client=site", "data.partition.kind=client_ids", "num_clients=3", "rounds=1")
    assert main(["train", *asked, *own]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["num_clients"] == 3 and 0 <= told["accuracy"] <= 1 and told["model_sha256"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"name": None}, "must name a set"),
        ({"name": "tests/other"}, "must be in .*data.download=true fetches it"),
        ({"subset": "small"}, "Available configs in the cache"),
        ({"train_split": "trian"}, "must be a split of the set.*'train', 'test'"),
        ({"target": "lable"}, "did you mean 'label'"),
        ({"client": "sites"}, "did you mean 'site'"),
        ({"inputs": "series"}, "data.example=package.function"),
        ({"partitioner": {"_target_": "flwr_datasets.partitioner.Iid"}}, "must be importable"),
        ({"channels": 2}, "must be one of 1, 3"),
    ],
)
def test_what_is_not_there_is_named_and_no_network_is_asked(wrong, told, cache):
    with pytest.raises((ConfigError, DataError), match=told):
        load(spec(cache, **wrong), seed=0)
