"""Sources and mini-batches."""

import dataclasses
import os
import pickle
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsys.data import Images, eval_batches, load, partition, train_batches
from fedsys.data.dataset import mean_and_std, stratified
from fedsys.data.loader import draw_shifts, padding
from fedsys.data.sources import SOURCES
from fedsys.errors import ConfigError, DataError
from fedsys.randomness import Address

DIGITS = {"source": "digits", "validation": 0.1}
SYNTHETIC = {"source": "synthetic", "examples": 300, "test_examples": 50, "shape": [3, 32, 32]}
HERE = Address(seed=1, client=2, round=3)


# --------------------------------------------------------------------------------------------------
# Sources


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load(DIGITS, seed=1)
    parts = (data.train, data.validation, data.test)
    ours = np.concatenate([part.pixels.numpy().reshape(-1, 64) for part in parts])
    labels = np.concatenate([part.labels.numpy() for part in parts])
    other = load_digits()
    theirs = np.rint(other.data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, np.column_stack([ours, labels]).astype(np.uint8))) == sorted(
        map(bytes, np.column_stack([theirs, other.target]).astype(np.uint8))
    )
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert int(data.train.pixels.max()) == 255


def test_digits_come_from_scikit_learns_loader_when_its_file_is_elsewhere(monkeypatch):
    import sklearn.datasets  # noqa: F401 - imported before its finder is replaced

    expected = load(DIGITS, seed=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert torch.equal(load(DIGITS, seed=1).train.pixels, expected.train.pixels)


def test_the_seed_moves_the_validation_part_and_never_the_test_part():
    one, other = load(DIGITS, seed=1), load(DIGITS, seed=2)
    assert torch.equal(one.test.pixels, other.test.pixels)
    assert not torch.equal(one.validation.pixels, other.validation.pixels)
    again = load(DIGITS, seed=1)
    assert torch.equal(one.train.pixels, again.train.pixels)
    assert torch.equal(one.validation.labels, again.validation.labels)


def test_every_part_has_its_share_of_every_class():
    data = load(DIGITS, seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    for part in (data.train, data.validation, data.test):
        counts = np.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(part)


def test_a_subset_is_stratified_and_limits_every_part():
    data = load({**DIGITS, "max_examples": 100}, seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 100)
    assert set(np.bincount(data.train.labels).tolist()) <= {8, 9, 10}


def test_no_validation_part_is_set_aside_unless_asked_for():
    data = load({**DIGITS, "validation": 0}, seed=1)
    assert len(data.validation) == 0
    assert data.validation.pixels.shape == (0, 1, 8, 8)
    assert list(eval_batches(data.validation, data, 10)) == []


def test_synthetic_classes_can_be_told_apart_and_depend_on_the_seed_alone():
    data = load({**SYNTHETIC, "noise": 0.8}, seed=1)
    train = data.train.pixels.flatten(1).float()
    centers = torch.stack([train[data.train.labels == k].mean(0) for k in range(10)])
    test = data.test.pixels.flatten(1).float()
    assert torch.equal(torch.cdist(test, centers).argmin(1), data.test.labels)
    assert torch.equal(load({**SYNTHETIC, "noise": 0.8}, seed=1).test.pixels, data.test.pixels)
    assert not torch.equal(load({**SYNTHETIC, "noise": 0.8}, seed=2).test.pixels, data.test.pixels)


def test_more_synthetic_examples_begin_with_the_same_chunks():
    spec = {**SYNTHETIC, "shape": [1, 2, 2], "examples": 4096}
    few = load(spec, seed=1).train.pixels
    many = load({**spec, "examples": 9000}, seed=1).train.pixels
    assert torch.equal(few, many[:4096])
    assert not torch.equal(many[:904], many[8096:9000])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 1), st.integers(0, 2**31))
def test_stratified_takes_each_class_in_proportion(labels, share, seed):
    labels = np.array(labels)
    count = round(share * len(labels))
    chosen = stratified(labels, count, np.random.default_rng(seed))
    assert len(chosen) == count
    assert np.all(np.diff(chosen) > 0)
    for k in np.unique(labels):
        exact = np.sum(labels == k) * count / len(labels)
        assert abs(np.sum(labels[chosen] == k) - exact) < 1.0


def test_mean_and_std_are_those_of_the_pixels():
    pixels = torch.randint(0, 256, (50, 3, 5, 7), dtype=torch.uint8, generator=Address(1).torch(""))
    pixels[:, 2] = 9
    mean, std = mean_and_std(pixels)
    exact = pixels.double() / 255
    assert mean == pytest.approx(exact.mean((0, 2, 3)).tolist())
    assert std[:2] == pytest.approx(exact.std((0, 2, 3), correction=0)[:2].tolist())
    assert std[2] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "cifar"}, "did you mean 'cifar10'?"),
        ({"source": None}, "data.source=None: must be one of digits, mnist"),
        ({"validation": 1.0}, "data.validation=1.0: must be a number at least 0 and below 1"),
        ({"validation": -0.1}, "data.validation=-0.1"),
        ({"validation": "much"}, "data.validation=much"),
        ({"test": 0.0}, "data.test=0.0: must be a number above 0 and below 1"),
        ({"max_examples": 0}, "data.max_examples=0"),
        ({"max_examples": 2.5}, "data.max_examples=2.5"),
        ({"augmentation": "flip"}, "data.augmentation=flip: must be one of none, crop, crop_flip"),
        ({"source": "synthetic", "shape": [3, 32]}, "data.shape=[3, 32]"),
        ({"source": "synthetic", "classes": 1}, "data.classes=1"),
        ({"source": "synthetic", "noise": 1.0}, "data.noise=1.0"),
    ],
)
def test_an_unusable_option_is_named_in_one_line(change, message):
    with pytest.raises(ConfigError) as caught:
        load({**DIGITS, **change}, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Sources of torchvision, from files in their formats


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root, title):
    raw = root / title / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    return images, labels


@pytest.mark.parametrize(
    ("source", "title"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_idx_files_of_mnist_are_read(tmp_path, source, title):
    images, labels = write_mnist(tmp_path, title)
    data = load({"source": source, "root": str(tmp_path)}, seed=0)
    assert np.array_equal(data.train.pixels[:, 0], images)
    assert np.array_equal(data.test.labels, labels)
    assert data.train.pixels.is_contiguous()
    assert len(data.mean) == 1
    assert data.num_classes == 10


def write_cifar(root, key, names, files):
    """Write the batches of CIFAR, as the NumPy of 2009 pickled them."""
    rng = np.random.default_rng(0)
    (root / "meta").parent.mkdir(parents=True, exist_ok=True)
    batches = {}
    for file in files:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        batch = {"data": pixels, key: (np.arange(20) % 10).tolist()}
        # Old pickles hold the integers 0 and 1 where NumPy now writes False and True.
        old = pickle.dumps(batch, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
        (root / file).write_bytes(old)
        batches[file] = pixels
    meta = "batches.meta" if key == "labels" else "meta"
    names_key = "label_names" if key == "labels" else "fine_label_names"
    (root / meta).write_bytes(pickle.dumps({names_key: names}))
    return batches


@pytest.fixture
def any_checksum(monkeypatch):
    """Let the readers of torchvision accept files of these tests."""
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, *_: os.path.isfile(path)
        )


def test_the_batches_of_cifar10_are_read(tmp_path, any_checksum):
    names = [f"class {k}" for k in range(10)]
    files = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    batches = write_cifar(tmp_path / "cifar-10-batches-py", "labels", names, files)
    data = load({"source": "cifar10", "root": str(tmp_path), "validation": 0.1}, seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
    assert np.array_equal(data.test.pixels.flatten(1), batches["test_batch"])
    assert data.classes == tuple(names)
    assert data.input_shape == (3, 32, 32)
    assert data.mean == (0.4914, 0.4822, 0.4465)


def test_the_fine_labels_of_cifar100_are_read(tmp_path, any_checksum):
    names = [f"class {k}" for k in range(100)]
    batches = write_cifar(tmp_path / "cifar-100-python", "fine_labels", names, ["train", "test"])
    data = load({"source": "cifar100", "root": str(tmp_path)}, seed=0)
    assert np.array_equal(data.train.pixels.flatten(1), batches["train"])
    assert data.num_classes == 100


def test_svhn_is_read_and_its_class_ten_is_the_digit_zero(tmp_path, any_checksum):
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
    labels = np.array([*range(1, 11), 1, 2])[:, None]
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    data = load({"source": "svhn", "root": str(tmp_path)}, seed=0)
    assert np.array_equal(data.train.pixels, pixels.transpose(3, 2, 0, 1))
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize("source", ["mnist", "cifar10", "svhn"])
def test_files_that_are_not_there_and_not_asked_for_are_a_configuration_error(tmp_path, source):
    with pytest.raises(ConfigError, match=r"data\.root=.*set data\.download=true") as caught:
        load({"source": source, "root": str(tmp_path / "nowhere")}, seed=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("source", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_a_download_without_a_network_says_so_once(tmp_path, monkeypatch, capsys, source):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    spec = {"source": source, "cache": str(tmp_path), "download": True}
    with pytest.raises(DataError) as caught:
        load(spec, seed=0)
    message = str(caught.value)
    assert message.startswith("data.download=true: ")
    assert "name resolution" in message
    assert "connect to the network" in message
    assert "\n" not in message
    assert capsys.readouterr().out == ""


def test_damaged_files_are_a_data_error(tmp_path):
    write_mnist(tmp_path, "MNIST")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"data\.root=.*cannot be read"):
        load({"source": "mnist", "root": str(tmp_path)}, seed=0)


# --------------------------------------------------------------------------------------------------
# The group of the configuration


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_has_a_group_whose_values_are_usable(source, tmp_path):
    file = Path(__file__).parents[2] / "conf" / "data" / f"{source}.yaml"
    spec = OmegaConf.to_container(OmegaConf.load(file))
    assert spec["source"] == source
    labels = np.arange(1000) % 10
    assert len(partition(labels, 8, spec["partition"], seed=0)) == 8
    try:
        task = {"text": "next_token", "table": "regression"}.get(source, "classification")
        data = load({**spec, "cache": str(tmp_path), "task": task}, seed=0)
    except ConfigError as error:
        # Nothing but the place of the files, or of the data set, is missing where it is needed.
        missing = {"own": "data._target_", "flwr_datasets": "data.name"}.get(source, "data.root")
        assert missing in str(error)
        assert source not in ("digits", "synthetic")
    else:
        assert data.augmentation == "none"


def test_no_group_is_without_a_source():
    folder = Path(__file__).parents[2] / "conf" / "data"
    groups = [OmegaConf.load(file) for file in folder.glob("*.yaml")]
    chosen = {group["source"] for group in groups if "source" in group}
    assert chosen == set(SOURCES)


# --------------------------------------------------------------------------------------------------
# Mini-batches


@pytest.fixture(scope="module")
def images():
    return load({**SYNTHETIC, "augmentation": "crop_flip"}, seed=1)


def batches(data, indices, batch_size=32, address=HERE, epoch=0, first_step=0):
    return list(train_batches(data.train, indices, data, batch_size, address, epoch, first_step))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 299), unique=True, max_size=80).map(np.array),
    st.integers(1, 100),
    st.integers(0, 5),
)
def test_an_epoch_sees_every_example_once(images, indices, batch_size, epoch):
    indices = indices.astype(np.int64)
    plain = dataclasses.replace(images, augmentation="none", mean=(0.0,) * 3, std=(1 / 255,) * 3)
    seen = batches(plain, indices, batch_size, epoch=epoch)
    sizes = [len(y) for _, y in seen]
    full, rest = divmod(len(indices), batch_size)
    if rest == 1 and full and batch_size > 1:
        assert sizes == [batch_size] * (full - 1) + [batch_size + 1]
    else:
        assert sizes == [batch_size] * full + [rest] * (rest > 0)
    got = sorted(bytes(x.round().byte().numpy()) for xs, _ in seen for x in xs)
    assert got == sorted(bytes(x.numpy()) for x in images.train.pixels[indices])
    labels = sorted(int(y) for _, ys in seen for y in ys)
    assert labels == sorted(images.train.labels[indices].tolist())


def test_the_same_address_repeats_bit_for_bit(images):
    one, other = batches(images, np.arange(100)), batches(images, np.arange(100))
    for (x, y), (again, labels) in zip(one, other, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.is_contiguous()


def test_another_seed_client_round_epoch_or_step_gives_other_batches(images):
    runs = [
        batches(images, np.arange(64), address=Address(1, 2, 3)),
        batches(images, np.arange(64), address=Address(9, 2, 3)),
        batches(images, np.arange(64), address=Address(1, 9, 3)),
        batches(images, np.arange(64), address=Address(1, 2, 9)),
        batches(images, np.arange(64), epoch=1),
    ]
    orders = [tuple(torch.cat([y for _, y in run]).tolist()) for run in runs]
    assert len(set(orders)) == len(runs)
    later = batches(images, np.arange(64), first_step=2)
    assert torch.equal(later[0][1], runs[0][0][1])
    assert not torch.equal(later[0][0], runs[0][0][0])


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip", "none"])
@pytest.mark.parametrize("shape", [[3, 32, 32], [1, 8, 8], [1, 28, 20], [2, 7, 7]])
def test_augmentation_is_what_a_slow_reference_does(augmentation, shape):
    data = load({**SYNTHETIC, "shape": shape, "augmentation": augmentation}, seed=1)
    address, indices = Address(5, 6, 7), np.arange(3, 60)
    order = torch.randperm(57, generator=address.torch("shuffle", step=2)).numpy()
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    _, height, width = shape
    rows, columns = padding(height, width)
    got = batches(data, indices, 25, address, epoch=2, first_step=40)
    for k, (x, _) in enumerate(got):
        chosen = indices[order[k * 25 : (k + 1) * 25]]
        shifts = draw_shifts(augmentation, len(chosen), height, width, address, 40 + k)
        for i, index in enumerate(chosen):
            image = data.train.pixels[index].numpy()
            if augmentation != "none":
                if shifts.flip[i]:
                    image = image[:, :, ::-1]
                image = np.pad(image, ((0, 0), (rows, rows), (columns, columns)))
                top, left = shifts.top[i], shifts.left[i]
                image = image[:, top : top + height, left : left + width]
            reference = (torch.from_numpy(image.copy()).float() / 255 - mean) / std
            torch.testing.assert_close(x[i], reference, rtol=1e-5, atol=1e-5)
    assert padding(32, 32) == (4, 4)


def test_crops_and_flips_cover_their_range_evenly():
    shifts = draw_shifts("crop_flip", 8100, 32, 32, Address(1), 0)
    for offsets in (shifts.top, shifts.left):
        assert np.bincount(offsets, minlength=9).min() > 750
        assert offsets.max() == 8
    assert 0.47 < shifts.flip.mean() < 0.53
    assert not draw_shifts("crop", 100, 32, 32, Address(1), 0).flip.any()


def test_evaluation_goes_in_order_without_augmentation(images):
    seen = list(eval_batches(images.test, images, 20))
    assert [len(y) for _, y in seen] == [20, 20, 10]
    assert torch.equal(torch.cat([y for _, y in seen]), images.test.labels)
    mean = torch.tensor(images.mean)[:, None, None]
    std = torch.tensor(images.std)[:, None, None]
    expected = (images.test.pixels.float() / 255 - mean) / std
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), expected, rtol=1e-5, atol=1e-5)


def test_batches_leave_the_data_as_it_was(images):
    before = images.train.pixels.clone()
    for x, _ in batches(images, np.arange(100)):
        x.zero_()
    for x, _ in eval_batches(images.train, images, 100):
        x.zero_()
    assert torch.equal(images.train.pixels, before)


def test_no_process_wide_generator_is_touched(images):
    state = torch.random.get_rng_state()
    legacy = np.random.get_state(legacy=False)["state"]["key"].copy()
    load(DIGITS, seed=1)
    batches(images, np.arange(100))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], legacy)


def test_a_batch_size_below_one_is_refused(images):
    with pytest.raises(ConfigError, match=r"client\.batch_size=0"):
        batches(images, np.arange(10), batch_size=0)


def test_taking_all_images_copies_nothing():
    part = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
    assert part.take(np.arange(4)) is part
    assert part.take(np.array([3, 1])).labels.tolist() == [3, 1]
