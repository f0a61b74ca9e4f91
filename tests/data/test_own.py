"""Any data: sets of the user's, text and tables, as tensors that are the same everywhere."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fedsys.config import objects
from fedsys.data import eval_batches, load, train_batches
from fedsys.data.dataset import quantiles
from fedsys.errors import ConfigError, DataError
from fedsys.randomness import Address
from fedsys.training.federation import build_model, check_model, federation, trained_model
from tests import own_work

OWN = "tests.own_work"
OF_PADDED = ["data=own", f"data._target_={OWN}.Padded", "model=own", f"model._target_={OWN}.Masked"]


class Three(torch.nn.Module):
    """A model of three inputs."""

    def forward(self, a, b, *, c):
        return a


def own(name, task="classification", **more):
    return {"source": "own", "_target_": f"{OWN}.{name}", "task": task, **more}


def test_a_set_is_read_as_it_is_and_divided_by_the_seed():
    found = load(own("rows", "regression", test=0.25, validation=0.1), seed=3)
    assert [len(p) for p in (found.train, found.validation, found.test)] == [30, 3, 11]
    assert (found.input_shape, found.num_classes, found.classes) == ((6,), 1, ())
    known = own_work.rows().tensors[0]
    parts = (found.train, found.validation, found.test)
    together = torch.cat([part.pixels for part in parts])
    assert torch.equal(together.sort(0).values, known.sort(0).values)
    other = load(own("rows", "regression", test=0.25, validation=0.1), seed=4)
    assert torch.equal(found.test.pixels, other.test.pixels)
    assert not torch.equal(found.train.pixels, other.train.pixels)


def test_inputs_that_are_no_images_come_to_the_model_as_they_are():
    found = load(own("rows", "regression"), seed=0)
    (x, y), *_ = eval_batches(found.validation if len(found.validation) else found.test, found)
    assert torch.equal(x, found.test.pixels) and y.shape == (len(x), 1)
    everyone = np.arange(len(found.train))
    batches = list(train_batches(found.train, everyone, found, 8, Address(0), 0, 0))
    assert {b.dtype for b, _ in batches} == {torch.float32}
    assert sum(map(len, (b for b, _ in batches))) == len(found.train)


def test_images_are_normalised_also_where_a_class_is_learned_for_each_pixel():
    found = load(own("pictures", "segmentation"), seed=0)
    assert found.pictures and found.num_classes == 3
    (x, y), *_ = eval_batches(found.test, found)
    assert x.dtype == torch.float32 and abs(float(x.mean())) < 0.5
    assert y.dtype == torch.int64 and y.shape[1:] == (8, 8)


def test_tokens_alone_are_shifted_and_ragged_ones_padded_by_the_users_function():
    found = load(own("Sentences", "next_token"), seed=0)
    assert torch.equal((found.train.pixels + 1) % 11, found.train.labels)
    assert found.input_shape == (8,) and found.num_classes == 11
    with pytest.raises(ConfigError, match=r"data\.collate.*give them one shape"):
        load(own("Words"), seed=0)
    for collate in ({"_target_": f"{OWN}.padded"}, f"{OWN}.padded"):
        words = load(own("Words", collate=collate, count=20), seed=0)
        assert words.input_shape == (6,) and words.train.pixels.dtype == torch.int64
        assert words.classes == ("class 0", "class 1")


def test_several_inputs_are_a_tuple_and_stay_together(configure):
    """Two inputs come to the model in their types, and rows of both are chosen alike."""
    found = load(own("Padded", test=0.25), seed=0)
    assert found.input_shape == (("int64", 6), ("bool", 6)) and not found.pictures
    everyone = np.arange(len(found.train))
    rows = 0
    for x, y in train_batches(found.train, everyone, found, 8, Address(0), 0, 0):
        words, padding = x.tensors
        assert torch.equal(words == 0, padding) and torch.equal((~padding).sum(1) > 3, y == 1)
        rows += len(x)
    assert rows == len(found.train)
    (x, _), *_ = eval_batches(found.test, found)
    assert torch.equal(x.tensors[1], found.test.pixels.tensors[1])
    both = load(own("Twofold", "regression"), seed=0)
    assert both.input_shape == (("float32", 1, 8, 8), ("float32", 3))
    assert 0 <= float(both.train.pixels.tensors[0].max()) <= 1
    config = configure(*OF_PADDED)
    dataset = federation(config).dataset
    check_model(build_model(config, dataset), dataset, config)
    with pytest.raises(ConfigError, match="must take the 2 tensors of an example"):
        check_model(Three(), dataset, config)
    for more in (["privacy=cut"], ["resilience=joint"], ["pruning=snip"]):
        refused = configure(*OF_PADDED, *more)
        with pytest.raises(ConfigError, match="has several inputs"):
            trained_model(refused, dataset)


def test_clients_may_be_those_that_the_data_name(configure):
    given = ["data=own", f"data._target_={OWN}.Words", f"data.collate={OWN}.padded",
             "data.partition.kind=client_ids"]  # fmt: skip
    fed = federation(configure(*given, "num_clients=2"))
    train = fed.dataset.train
    assert sum(map(len, fed.parts)) == len(train)
    for client, part in enumerate(fed.parts):
        assert set(train.owners[torch.from_numpy(part)].tolist()) == {client}
    with pytest.raises(ConfigError, match="num_clients=3: must be 2"):
        federation(configure(*given, "num_clients=3"))
    with pytest.raises(ConfigError, match="say whose an example is"):
        federation(configure("data=table", "task=regression", "data.partition.kind=client_ids"))


def test_numbers_are_divided_by_tenths_of_the_target(configure):
    assert np.bincount(quantiles(np.arange(100, dtype=np.float32))).tolist() == [10] * 10
    config = configure("data=table", "task=regression", "num_clients=4",
                       "data.partition.alpha=0.05")  # fmt: skip
    fed = federation(config)
    assert sum(map(len, fed.parts)) == len(fed.dataset.train)
    spread = [fed.dataset.train.labels[torch.from_numpy(part)].std() for part in fed.parts]
    assert min(spread) < float(fed.dataset.train.labels.std())  # clients have targets of their own


def test_the_table_that_is_installed_is_standardised_by_its_training_part():
    found = load({"source": "table", "task": "regression"}, seed=0)
    assert len(found.train) + len(found.test) == 442 and found.input_shape == (10,)
    assert float(found.train.pixels.mean(0).abs().max()) < 1e-5
    assert float(found.train.labels.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert float(found.test.pixels.mean(0).abs().max()) > 1e-3


def test_a_csv_file_may_have_classes_and_clients(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{k},{k % 5},{'yes' if k % 2 else 'no'},site{k % 3}" for k in range(30)]
    path.write_text("a,b,good,site\n" + "\n".join(lines))
    spec = {"source": "table", "file": str(path), "target": "good", "client": "site"}
    found = load(spec, seed=0)
    assert found.classes == ("no", "yes") and found.input_shape == (2,)
    assert set(found.train.owners.tolist()) == {0, 1, 2}
    for wrong, told in (
        ({"target": "goood"}, "did you mean 'good'?"),
        ({"target": "a", "client": None}, "'no' is no number|'yes' is no number"),
        ({"file": str(tmp_path / "no.csv")}, "cannot be read"),
        ({"task": "segmentation"}, "must be regression or classification"),
    ):
        with pytest.raises((ConfigError, DataError), match=told):
            load({**spec, **wrong}, seed=0)


def test_a_parquet_file_gives_what_the_csv_file_of_the_same_rows_gives(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"a": [k / 3 for k in range(30)], "b": [k % 5 for k in range(30)],
            "flag": [k % 7 == 0 for k in range(30)], "site": [f"s{k % 3}" for k in range(30)],
            "good": [k % 4 for k in range(30)]}  # fmt: skip
    lines = [
        ",".join(rows),
        *(",".join(str(v) for v in row) for row in zip(*rows.values(), strict=True)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines).replace("False", "0").replace("True", "1"))
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    for more in ({}, {"task": "regression"}):
        spec = {"source": "table", "client": "site", **more}
        csv, other = (
            load({**spec, "file": str(tmp_path / f"t.{kind}")}, seed=1)
            for kind in ("csv", "parquet")
        )
        assert torch.equal(csv.train.pixels, other.train.pixels) and csv.classes == other.classes
        assert torch.equal(csv.test.labels, other.test.labels)
        assert torch.equal(csv.train.owners, other.train.owners)
    rows["a"][3] = None
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="column a lacks 1 values"):
        load({"source": "table", "file": str(tmp_path / "t.parquet")}, seed=0)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load({"source": "table", "file": str(tmp_path / "t.parquet")}, seed=0)


def test_a_text_may_be_cut_into_the_tokens_of_a_tokenizer(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("to be or not to be " * 40)
    spec = {"source": "text", "task": "next_token", "file": str(path), "length": 6}
    found = load({**spec, "tokenizer": f"{OWN}.words"}, seed=0)
    assert found.num_classes == 4 and found.train.pixels[0].tolist() == [3, 0, 2, 1, 3, 0]
    told = {"_target_": f"{OWN}.Pieces", "size": 9}
    pieces = load({**spec, "tokenizer": told}, seed=0)
    assert pieces.num_classes == 9 and torch.equal(pieces.train.pixels, found.train.pixels)
    assert load({**spec, "tokenizer": told, "vocabulary": 12}, seed=0).num_classes == 12
    for wrong, says in (
        ({"tokenizer": f"{OWN}.steep"}, "data.tokenizer=tests.own_work.steep: TypeError"),
        ({"tokenizer": "str.upper"}, "must be importable"),
        ({"tokenizer": "builtins.str.upper"}, "must make a list of whole numbers"),
        ({"tokenizer": told, "vocabulary": 2}, "above the largest token, 3"),
    ):
        with pytest.raises((ConfigError, DataError), match=says):
            load({**spec, **wrong}, seed=0)


def test_text_is_cut_into_windows_that_know_what_comes_next(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(bytes(range(200)) * 2)
    spec = {"source": "text", "task": "next_token", "file": str(path), "length": 10, "test": 0.25}
    found = load(spec, seed=0)
    assert (len(found.train), len(found.test)) == (29, 10)
    assert torch.equal(found.train.pixels[:, 1:], found.train.labels[:, :-1])
    assert found.test.pixels[0, 0] == 290 % 200 and found.num_classes == 256
    assert len(load({"source": "text", "task": "next_token"}, seed=0).train) > 1000
    with pytest.raises(ConfigError, match="task=next_token model=gpt"):
        load({"source": "text"}, seed=0)
    with pytest.raises(ConfigError, match="must be shorter"):
        load({**spec, "length": 300}, seed=0)
    path.write_bytes(b"six by")  # it said that windows must be shorter, and none would do
    with pytest.raises(DataError, match="has 6 tokens; must have more than 6"):
        load(spec, seed=0)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (own("nothing"), "must be importable"),
        (own("COUNT"), "must name a class or a function"),
        (own("padded", examples=[]), "cannot be made of its arguments"),
        (own("padded"), "cannot be made"),
        (own("rows"), "task=regression learns numbers"),
        (own("labels"), "has one class for each example"),
        (own("rows", "regression", size=3), "must be an argument of"),
        (own("Sentences"), "must give \\(inputs, targets\\)"),
        (own("Words", collate=f"{OWN}.padded", classes=1), "above the largest class, 1"),
        (own("rows", "regression", augmentation="crop"), "is of images"),
        ({"source": "digits", "task": "regression"}, "must be classification with data.source"),
    ],
)
def test_data_that_do_not_suit_are_refused_with_a_way_out(spec, told):
    with pytest.raises(ConfigError, match=told):
        load(spec, seed=0)


def test_an_example_that_cannot_be_read_is_named(monkeypatch):
    class Broken(TensorDataset):
        def __getitem__(self, index):
            if index == 7:
                raise KeyError("gone")
            return super().__getitem__(index)

    monkeypatch.setattr(own_work, "rows", lambda: Broken(torch.zeros(9, 2), torch.zeros(9)))
    with pytest.raises(DataError, match=r"example 7 cannot be read: KeyError"):
        load(own("rows", "regression"), seed=0)


ROWS = torch.arange(24.0).reshape(8, 3)
CLASSES = torch.arange(8) % 2
TOKENS = torch.arange(40).reshape(8, 5)
IMAGES = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
GAP = torch.tensor([0.0, 1, torch.nan, 3, 4, torch.inf, 6, 7])


class Endless(TensorDataset):
    def __len__(self):
        raise OverflowError("has no end")


@pytest.mark.parametrize(
    ("task", "given", "told"),
    [
        # was cast to its real part
        ("regression", (ROWS, torch.complex(GAP, GAP)), "complex64 has no order"),
        ("regression", (ROWS, GAP), "data=targets: must be finite.* 2 of 8 .*the first is 2"),
        # were trained, to a model of NaN
        ("regression", (ROWS * GAP[:, None], GAP), "data=targets: must be finite"),
        ("classification", (ROWS * GAP[:, None], CLASSES), "data=inputs: must be finite"),
        ("classification", (ROWS.double() * 1e300, CLASSES), "finite numbers .of float32."),
        # was learned as labels that hold twice
        ("multilabel", (ROWS, torch.arange(24).reshape(8, 3)), "go from 0 to 23; .*one_hot"),
        ("multilabel", (ROWS, torch.arange(8)), "a class as a whole number is task=classification"),
        ("classification", (ROWS, CLASSES * 0), "must be of 2 or more classes"),
        ("classification", (ROWS, CLASSES - 1), "from 0 on, and -1 is there"),
        # the model was asked for outputs of a shape that nobody meant
        ("segmentation", (IMAGES, IMAGES[:, :1]), r"\(H, W\).* have shape \(1, 4, 4\); squeeze"),
        ("segmentation", (IMAGES, CLASSES), r"have shape \(\)"),
        ("next_token", (TOKENS, CLASSES), r"\(tokens,\).* have shape \(\)"),
        # were errors of torch
        ("next_token", (TOKENS[:, :1],), r"2 or more tokens.* of shape \(1,\)"),
        ("next_token", (TOKENS[:, 0],), r"2 or more tokens.* of shape \(\)"),
    ],
)
def test_targets_and_inputs_that_no_loss_makes_sense_of_are_refused(task, given, told):
    key = objects.target_of(TensorDataset(*given), "dataset")
    with pytest.raises(ConfigError, match=told):
        load({"source": "own", **key, "task": task}, seed=0)


def test_an_object_is_told_by_its_kind_where_its_path_says_nothing():
    key = objects.target_of(TensorDataset(ROWS), "dataset")
    with pytest.raises(ConfigError, match=r"^data=TensorDataset-\d+: must give"):
        load({"source": "own", **key}, seed=0)
    key = objects.target_of(Endless(ROWS, CLASSES), "dataset")
    with pytest.raises(DataError, match=r"^data=Endless-\d+: has no len\(\): OverflowError"):
        load({"source": "own", **key}, seed=0)


def test_a_number_for_each_example_is_an_input():
    found = load(own("numbers", "regression"), seed=0)
    assert found.input_shape == () and len(found.train)


def test_grey_images_without_a_channel_have_masks():
    found = load(own("grey", "segmentation"), seed=0)
    assert (found.input_shape, found.num_classes) == ((8, 8), 3)


def test_a_table_may_have_the_names_that_pandas_gives_the_columns_of_an_array(tmp_path):
    rows = "".join(f"{i},{i % 3},{i / 2}\n" for i in range(12))
    (tmp_path / "t.csv").write_text("0,1,2\n" + rows)
    found = load({"source": "table", "file": str(tmp_path / "t.csv"), "task": "regression"}, seed=0)
    assert found.input_shape == (2,)


@pytest.mark.parametrize(
    ("text", "more", "told"),
    [
        ("a,a,y\n1,2,3\n", {}, "several columns 'a'"),  # the last one was taken alone
        ("1,2,3\n4,5,6\n", {}, "must begin with a line of names, and begins with 1, 2, 3"),
        ("a,b,y\n1,2,3\n", {"client": "y"}, "data.client=y: must be another column"),
        ("a;b;y\n1;2;3\n", {}, "t.csv: must have a column beside a;b;y; .*by commas"),
        ("a,b,y\n1,,3\n", {}, "line 2, column b: '' is no number; fill in what is missing"),
        ("a,b,y\n1,u,3\n", {}, "line 2, column b: 'u' is no number; turn categories"),
        ("a,b,y\n1,2,u\n", {}, "line 2, column y: 'u' is no number"),
        ("a,b,y\n1,nan,3\n", {}, "column b: all numbers must be finite"),
        ("a,b,y\n1,2,3\n", {"target": "x"}, "data.target=x: must be a column of the table"),
        ("a,b,y\n1,2\n", {}, "row 1 has 2 columns instead of 3"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, more, told):
    head, row, *rest = text.split("\n")
    (tmp_path / "t.csv").write_text("\n".join([head, row, *rest[:-1], *[row] * 3]))
    with pytest.raises((ConfigError, DataError), match=told):
        load(
            {"source": "table", "task": "regression", "file": str(tmp_path / "t.csv"), **more},
            seed=0,
        )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["data=table", "task=regression", "model=mlp"], ""),
        (["data=text", "task=next_token", "model=gpt", "data.max_examples=200"], ""),
        (
            ["data=text", "task=next_token", "model=mlp", "data.max_examples=200"],
            "must accept|64, 256",
        ),
        (["data=table", "task=regression", "model=gpt"], "must|takes"),
    ],
)
def test_a_model_that_does_not_suit_the_data_is_refused_before_training(given, told, configure):
    config = configure(*given)
    dataset = federation(config).dataset
    if not told:
        return check_model(build_model(config, dataset), dataset, config)
    with pytest.raises(ConfigError, match=told):
        check_model(build_model(config, dataset), dataset, config)


def test_without_a_task_a_model_is_looked_at_as_one_of_images_in_classes(configure):
    config = configure("data=digits")
    dataset = federation(config).dataset
    check_model(build_model(config, dataset), dataset)
    with pytest.raises(ConfigError, match="has 9 outputs"):
        check_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 9)), dataset)
