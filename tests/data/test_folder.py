"""Folders of images: layouts, the cache, and what is said when something is wrong."""

import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from fedsys.data import load
from fedsys.errors import ConfigError, DataError


def write_image(path, value, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return np.asarray(Image.open(path))


def write_folder(root, parts=("train", "test"), classes=("cat", "dog"), each=5):
    """Write PNG files and return the arrays by (part, class, number)."""
    written = {}
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            for k in range(each):
                value = p * 1000 + c * 100 + k
                path = root / part / name / f"{k:03}.png"
                written[part, name, k] = write_image(path, value)
    return written


@pytest.fixture
def spec(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    return {"source": "image_folder", "root": str(root), "cache": str(tmp_path / "cache")}


@pytest.fixture
def root(spec, tmp_path):
    return tmp_path / "images"


def test_pixels_and_labels_are_those_of_torchvisions_image_folder(spec, root):
    from torchvision.datasets import ImageFolder

    write_folder(root, classes=("b", "a", "c"))
    (root / "README.md").write_text("not a class")
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    write_image(root / "train" / "a" / "more" / "z.png", 7)
    data = load(spec, seed=0)
    assert data.classes == ("a", "b", "c")
    assert data.input_shape == (3, 4, 6)
    for part, images in (("train", data.train), ("test", data.test)):
        other = ImageFolder(str(root / part))
        assert images.labels.tolist() == other.targets
        # The other order of the files within a class is of no importance.
        expected = sorted(np.asarray(image).transpose(2, 0, 1).tobytes() for image, _ in other)
        assert sorted(image.numpy().tobytes() for image in images.pixels) == expected


def test_the_cache_gives_the_same_images_without_opening_a_file(spec, root, monkeypatch):
    write_folder(root)
    first = load(spec, seed=0)
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("decoded again"))
    second = load(spec, seed=0)
    assert np.array_equal(first.train.pixels, second.train.pixels)
    assert np.array_equal(first.test.labels, second.test.labels)


def test_a_changed_file_is_decoded_again_and_the_old_cache_goes(spec, root, tmp_path):
    write_folder(root)
    before = load(spec, seed=0)
    pixels = write_image(root / "train" / "cat" / "000.png", 99)
    os.utime(root / "train" / "cat" / "000.png", ns=(1, 1))
    after = load(spec, seed=0)
    assert np.array_equal(after.train.pixels[0], pixels.transpose(2, 0, 1))
    assert not np.array_equal(before.train.pixels[0], after.train.pixels[0])
    assert np.array_equal(before.train.pixels[1:], after.train.pixels[1:])
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "images").iterdir())
    assert kept == [".json", ".npy"]


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "other shape", "other type"])
def test_a_damaged_cache_is_not_believed(spec, root, tmp_path, damage):
    write_folder(root)
    good = load(spec, seed=0).train.pixels.clone()
    (array,) = (tmp_path / "cache" / "images").glob("*.npy")
    (manifest,) = (tmp_path / "cache" / "images").glob("*.json")
    if damage == "truncated":
        array.write_bytes(array.read_bytes()[:-5])
    elif damage == "no manifest":
        manifest.write_text("[")
    elif damage == "other shape":
        manifest.write_text(json.dumps({"shape": [1, 3, 4, 6]}))
    else:
        np.save(array, np.zeros((20, 3, 4, 6)))
    assert np.array_equal(load(spec, seed=0).train.pixels, good)


def test_without_a_writable_cache_the_images_stay_in_memory(spec, root, tmp_path, caplog):
    write_folder(root)
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        data = load({**spec, "cache": str(tmp_path / "file")}, seed=0)
    assert len(data.train) == 10
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "data.cache" in caplog.text


def test_a_full_disk_leaves_nothing_half_written(spec, root, tmp_path, monkeypatch, caplog):
    write_folder(root)

    def full(file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(load(spec, seed=0).train) == 10
    assert "No space left" in caplog.text
    assert list((tmp_path / "cache" / "images").iterdir()) == []


def test_the_same_folder_may_be_decoded_several_times_at_once(spec, root, tmp_path, monkeypatch):
    write_folder(root)
    together, save = threading.Barrier(3), np.save

    def meet_and_save(file, *args, **kwargs):
        together.wait(timeout=60)
        save(file, *args, **kwargs)

    monkeypatch.setattr(np, "save", meet_and_save)
    with ThreadPoolExecutor(3) as pool:
        read = list(pool.map(lambda _: load(spec, seed=0).train.pixels, range(3)))
    assert all(torch.equal(pixels, load(spec, seed=0).train.pixels) for pixels in read)
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "images").iterdir())
    assert kept == [".json", ".npy"]


def test_a_link_to_nowhere_is_named(spec, root):
    write_folder(root)
    (root / "train" / "cat" / "zzz.png").symlink_to(root / "nowhere.png")
    assert "zzz.png" in refused(spec, DataError)


# --------------------------------------------------------------------------------------------------
# Layouts


def test_without_a_test_folder_a_stratified_part_is_taken(spec, root):
    write_folder(root, parts=("",), each=20)
    data = load({**spec, "test": 0.25, "validation": 0.2}, seed=3)
    for images, each in ((data.test, 5), (data.validation, 3), (data.train, 12)):
        assert np.bincount(images.labels).tolist() == [each, each]
    other = load({**spec, "test": 0.25, "validation": 0.2}, seed=4)
    assert np.array_equal(data.test.pixels, other.test.pixels)
    assert not np.array_equal(data.validation.pixels, other.validation.pixels)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_used_and_the_training_part_stays_whole(spec, root, name):
    written = write_folder(root, parts=("train", "test", name))
    data = load({**spec, "validation": 0.5}, seed=0)
    assert len(data.train) == 10
    assert np.array_equal(data.validation.pixels[9], written[name, "dog", 4].transpose(2, 0, 1))


def test_grey_images_and_other_modes_are_brought_to_the_channels_asked_for(spec, root):
    write_folder(root)
    grey = write_image(root / "train" / "cat" / "000.png", 5, mode="L")
    write_image(root / "train" / "cat" / "001.png", 5, mode="P")
    write_image(root / "train" / "cat" / "002.png", 5, mode="RGBA")
    colour = load(spec, seed=0).train.pixels
    assert all(np.array_equal(colour[0, c], grey) for c in range(3))
    assert np.array_equal(load({**spec, "channels": 1}, seed=0).train.pixels[0, 0], grey)


@pytest.mark.parametrize(("size", "shape"), [(8, (3, 8, 8)), ([4, 12], (3, 4, 12))])
def test_images_are_resized_when_asked(spec, root, size, shape):
    write_folder(root)
    write_image(root / "train" / "cat" / "000.png", 5, size=(30, 20))
    assert load({**spec, "size": size}, seed=0).input_shape == shape


# --------------------------------------------------------------------------------------------------
# Bad input


def refused(spec, kind=ConfigError):
    with pytest.raises(kind) as caught:
        load(spec, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_root_that_is_not_given_or_not_there_is_refused(spec, tmp_path):
    assert "data.root=None: must name" in refused({**spec, "root": None})
    missing = str(tmp_path / "nowhere")
    assert refused({**spec, "root": missing}) == f"data.root={missing}: must be an existing folder"


def test_the_only_folder_of_an_unpacked_archive_is_taken(spec, root):
    write_folder(root / "cifar")
    outer = load(spec, seed=1)
    inner = load({**spec, "root": str(root / "cifar")}, seed=1)
    assert torch.equal(outer.train.pixels, inner.train.pixels)
    assert outer.classes == inner.classes


def test_a_folder_without_classes_is_refused(spec, root):
    assert "it holds no folder" in refused(spec)
    write_folder(root, parts=("test",))
    assert "it holds test" in refused(spec)


def test_an_unreadable_image_is_named(spec, root, tmp_path):
    write_folder(root)
    broken = root / "train" / "dog" / "002.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert f"{broken}: cannot be read as an image" in refused(spec, DataError)
    broken.write_bytes(b"no image at all")
    assert f"{broken}: cannot be read as an image" in refused(spec, DataError)
    assert not (tmp_path / "cache").exists()


def test_an_empty_class_is_named(spec, root):
    write_folder(root)
    (root / "train" / "ant").mkdir()
    (root / "test" / "ant").mkdir()
    assert f"{root / 'train' / 'ant'}: the class has no image" in refused(spec, DataError)


def test_a_class_that_only_one_part_has_is_named(spec, root):
    write_folder(root)
    write_image(root / "test" / "fox" / "0.png", 1)
    message = refused(spec, DataError)
    assert "fox" in message
    assert "dog" not in message


def test_a_single_class_is_refused(spec, root):
    write_folder(root, classes=("cat",))
    assert "must hold at least two class folders" in refused(spec, DataError)


def test_two_images_of_different_size_are_named(spec, root):
    write_folder(root)
    write_image(root / "test" / "dog" / "001.png", 1, size=(9, 9))
    message = refused(spec)
    assert "data.size=None" in message
    assert f"{root / 'train' / 'cat' / '000.png'} has 6x4 pixels" in message
    assert f"{root / 'test' / 'dog' / '001.png'} has 9x9" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("channels", 2), ("size", 0), ("size", [3]), ("size", "big"), ("test", 0.0), ("test", 1.5)],
)
def test_an_unusable_option_is_named(spec, root, key, value):
    write_folder(root, parts=("",))
    assert f"data.{key}={value}" in refused({**spec, key: value})
