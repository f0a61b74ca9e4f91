import json

import numpy as np
import pytest

from fedsys.commands.bench.leakage_models import make_pool
from fedsys.errors import ConfigError
from fedsys.main import main
from fedsys.training import federation

SMALL = [
    "model.width=4",
    "model.hidden=16",
    "bench.examples=60",
    "bench.canaries=20",
    "bench.known=40",
    "bench.victims=10",
    "bench.epochs=2",
    "bench.client_size=2",
    "bench.invert_epochs=1",
    "bench.width=8",
    "bench.trials=500",
    "bench.pictures=3",
    "bench.label_epsilons=[1]",
]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """One small audit: its folder."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    assert main(["bench", "leakage", *SMALL, "json=true", f"run.dir={folder}"]) == 0
    return folder


def figures_of(folder):
    return json.loads((folder / "run.json").read_text())["result"]


def test_every_cut_is_attacked_with_and_without_each_mechanism(audited):
    figures = figures_of(audited)
    cells = [(row["mechanism"], row["epsilon"], row["cut"]) for row in figures["cuts"]]
    without = [("none", None, cut) for cut in (0, 1, 2, 3)]
    protected = [(m, 8.0, cut) for m in ("record", "client", "cut") for cut in (1, 2, 3)]
    assert cells == [*without, *protected]
    for row in figures["cuts"]:
        assert -1 <= row["ssim"] <= 1 and row["psnr"] > 0
        if row["cut"]:
            names = ("label_auc", "label_auc_activations", "label_auc_at_1")
            assert all(0 <= row[name] <= 1 for name in names)
    assert figures["ssim_blind"] == figures["cuts"][0]["ssim"]


def test_lower_bounds_stand_beside_claims_and_lie_below_them(audited):
    figures = figures_of(audited)
    release, response = figures["releases"]
    assert 0.5 < release["epsilon_at_least"] <= release["claim"] == 8.0
    assert release["releases"] == 2  # one in each epoch
    assert 0.5 < response["epsilon_at_least"] <= response["claim"] == 1.0
    assert figures["holds"] is True
    models = {row["mechanism"]: row for row in figures["models"]}
    assert list(models) == ["none", "record", "client", "cut", "label"]
    claims = {name: row["claim"] for name, row in models.items()}
    # of what the server app sees, the cut claims nothing, and labels nothing of who is in
    assert claims == {"none": None, "record": 8.0, "client": 8.0, "cut": None, "label": None}
    for row in models.values():
        assert 0 <= row["loss_auc"] <= 1 and 0 <= row["ratio_tpr"] <= 1


def test_what_policies_take_and_the_picture_are_in_the_folder(audited):
    told = json.loads((audited / "leakage.json").read_text())
    assert told["version"] == 1
    assert told["units"] == [
        ["conv1", [4, 8, 8]],
        ["conv2", [128]],
        ["fc1", [16]],
        ["fc2", [10]],
    ]
    similar = {(row["mechanism"], row["cut"]): row["ssim"] for row in told["cuts"]}
    assert set(similar) == {
        (m, cut) for m in ("none", "record", "client", "cut") for cut in (1, 2, 3)
    }
    picture = (audited / "plots" / "reconstructions.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("bench.mechanisms=[none,nosie]", "bench.mechanisms=nosie"),
        ("bench.examples=2000", "must leave room in the"),
        ("bench.models=1", "bench.models=1: must be at least 2"),
        ("bench.noise=uniform", "must be one of gaussian, laplace"),
    ],
)
def test_what_cannot_be_audited_is_refused(option, told, tmp_path, capsys):
    given = [o for o in SMALL if o.partition("=")[0] != option.partition("=")[0]]
    assert main(["bench", "leakage", *given, option, f"run.dir={tmp_path / 'run'}"]) == 2
    assert told in capsys.readouterr().err


def test_attacker_and_models_share_no_image_and_canaries_have_wrong_labels(configure):
    config = configure("+bench=leakage")
    dataset = federation.federation(config).dataset
    options = {"examples": 100, "canaries": 30, "known": 200, "models": 4}
    pool = make_pool(dataset, options, 0)
    known = {image.tobytes() for image in pool.known.numpy()}
    ours = [image.tobytes() for image in pool.images.pixels.numpy()]
    assert not known & set(ours)
    truth = {
        image.tobytes(): int(label)
        for image, label in zip(dataset.train.pixels.numpy(), dataset.train.labels, strict=True)
    }
    right = np.array([truth[image] for image in ours]) == pool.images.labels.numpy()
    assert right[:100].all() and not right[100:].any()
    assert pool.members.shape == (4, 130) and 0.3 < pool.members.mean() < 0.7
    assert len(pool.of_model(2)) == pool.members[2].sum()
    with pytest.raises(ConfigError, match=r"bench\.examples=5000"):
        make_pool(dataset, {**options, "examples": 5000}, 0)
