"""A portfolio: variants of one trained model with what each costs, in a folder, as data.

::

    manifest.json     what all have in common, and every variant's figures and checksums
    variants/NAME/    weights.safetensors and architecture.json
    (`fedsys.pruning.dense.architecture`),
                      and model.onnx, where that was asked for; it alone for a variant of int8

`Portfolio.load` checks every file against the manifest before anything is used, so a damaged one
is refused by its name. The manifest is written last: a folder without it is no portfolio. Nothing
in it is code.

DNNShifter (Eccles et al., FGCS 152, 2024) speaks of such a portfolio; its public code has none.
`fedsys.pruning.measuring` finds the figures and decides which variants stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, final

from fedsys.errors import ConfigError, ModelError, did_you_mean
from fedsys.files import json_text, write_atomic, writing
from fedsys.pruning.file_names import ARCHITECTURE, WEIGHTS
from fedsys.pruning.file_names import ONNX as ONNX

if TYPE_CHECKING:  # an endpoint of ONNX Runtime alone does without PyTorch
    from torch import Tensor, fx, nn

FORMAT = "fedsys-portfolio-1"
MANIFEST = "manifest.json"
VARIANTS = "variants"
PARENT = "parent"
"""Name of the variant that is the unpruned model."""

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
"""In what a variant computes; its inputs and outputs are float32 in any case."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REMAKE = "copy or make the portfolio again"


@dataclass(frozen=True, slots=True)
class Latency:
    """How long one batch takes on the machine that made the portfolio.

    Attributes:
        batch: Examples in the batch.
        threads: Intra-op threads.
        p50_ms: Median over the runs, in milliseconds.
        p95_ms: 95th percentile.
        runs: Number of timed runs.
    """

    batch: int
    threads: int
    p50_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of a portfolio, with its figures.

    Attributes:
        name: Its name, and that of its folder.
        accuracy: Share of the validation part that it gets right, in [0, 1].
        params: Parameters, and constants of its graph.
        macs: Multiply-accumulates for one example.
        bytes: Size of its files.
        peak_bytes: Memory that loading it and answering a batch took at its peak, beyond that of
            a process that has loaded the libraries only; 0 if it was not measured.
        latencies: By batch size and threads; the first is the one that variants are ordered by
            in pictures and reports.
        precision: One of `PRECISIONS`.
        sparsity: Share of the prunable weights that was pruned, in [0, 1).
        folded: BatchNorms that are folded into the layer before them when it is read to answer;
            its files have them still.
        kept: Names of those that are not, because folding them changes outputs.
        made: How it was made, in words.
        source: Path of the run that trained it further, if that began from a variant; else empty.
        test_accuracy: Share of the test part; scored once, when all choices had been made. None
            if there is no test part.
        max_abs_diff: Largest difference of its outputs to those of the masked model that it was
            converted from, in the type of that model, on the probes of the conversion and, in
            float32, on `compared_images`, as it answers.
        max_abs_output: Largest output of that masked model there.
        compared_images: Images of the validation part on which both were compared.
        other_answers: Those of them that the masked model answers otherwise: ties in which
            rounding decides, or the conversion is refused.
        channels: Outputs of each convolution and linear layer: name, before, after.
        onnx_latencies: The same as `latencies` by ONNX Runtime, measured in turns with them; empty
            where there is no file for it, and for int8, which nothing else computes.
        onnx_max_abs_diff: Largest difference of its outputs there, on the probes of the export.
        files: SHA-256 of each of its files, by name.
    """

    name: str
    accuracy: float
    params: int
    macs: int
    bytes: int
    peak_bytes: int
    latencies: tuple[Latency, ...]
    precision: str = "float32"
    sparsity: float = 0.0
    folded: int = 0
    kept: tuple[str, ...] = ()
    made: str = ""
    source: str = ""
    test_accuracy: float | None = None
    max_abs_diff: float = 0.0
    max_abs_output: float = 0.0
    compared_images: int = 0
    other_answers: int = 0
    channels: tuple[tuple[str, int, int], ...] = ()
    onnx_latencies: tuple[Latency, ...] = ()
    onnx_max_abs_diff: float = 0.0
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def p50_ms(self) -> float:
        """Median latency at the first batch size and thread count."""
        return self.latencies[0].p50_ms

    @property
    def p95_ms(self) -> float:
        """95th percentile of the latency at the first batch size and thread count."""
        return self.latencies[0].p95_ms

    def latency(self, batch: int, threads: int) -> Latency | None:
        """Return what was measured with so many examples and threads, or None."""
        fitting = (e for e in self.latencies if (e.batch, e.threads) == (batch, threads))
        return next(fitting, None)


@dataclass(frozen=True, slots=True)
class About:
    """What all variants of a portfolio have in common.

    Attributes:
        model: The `model` group of the configuration that the parent was built from.
        classes: Name of each class, in the order of the outputs.
        input_shape: Channels, height and width of an image.
        mean: Per channel, of pixels in [0, 1]; a model takes ``(pixels - mean) / std``.
        std: Per channel, above 0.
        machine: What latencies and memory were measured on, in words.
        source: Where the parent came from, in words.
    """

    model: Mapping[str, Any]
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    machine: str = ""
    source: str = ""


Content: TypeAlias = "fx.GraphModule | bytes"
"""What a variant consists of: a dense model, or the bytes of an ONNX file."""


@final
@dataclass(frozen=True, slots=True)
class Portfolio:
    """The variants of one model, loaded from a folder. Get one by `load` or `write`.

    Attributes:
        folder: Where it is.
        about: What the variants have in common.
        variants: All of them, the most accurate first; of equals, the faster one first.
        digest: SHA-256 of the manifest: equal for equal portfolios.
    """

    folder: Path
    about: About
    variants: tuple[Variant, ...]
    digest: str

    @property
    def parent(self) -> Variant:
        """The unpruned model."""
        return self.variant(PARENT)

    def variant(self, name: str) -> Variant:
        """Return the variant of a name.

        Raises:
            ConfigError: There is none.
        """
        names = [variant.name for variant in self.variants]
        if name not in names:
            rule = f"must be one of {', '.join(names)}"
            raise ConfigError.of("variant", name, rule, did_you_mean(name, names))
        return self.variants[names.index(name)]

    def module(self, name: str) -> nn.Module:
        """Read a variant: a module in evaluation mode from float32 images to float32 outputs.

        It has the form in which it answers (`fedsys.pruning.dense.fold`). To train it, read its
        folder by `fedsys.pruning.dense.architecture.load`.

        Raises:
            ConfigError: There is no such variant.
            ModelError: A file is missing or damaged, the variant does not compute what the
                manifest says, or it needs a package that is not installed.
        """
        variant = self.variant(name)
        folder = self.folder / VARIANTS / variant.name
        if WEIGHTS not in variant.files:
            from fedsys.pruning.precision import OnnxModule  # needs a package of an extra

            return _answers(OnnxModule(self.onnx(name)), self.about, folder)
        from fedsys.pruning.dense import architecture
        from fedsys.pruning.dense.fold import answering
        from fedsys.pruning.memory import discard

        model = architecture.load(folder)
        try:
            shape, fold = self.about.input_shape, variant.folded > 0
            module = answering(model, shape, fold=fold, keep=variant.kept)
        except ModelError:
            raise
        except Exception as error:  # the graph is run to find what can be folded
            raise _useless(folder, repr(error)) from error
        discard(model)
        return _answers(module, self.about, folder)

    def onnx(self, name: str) -> bytes:
        """Read the ONNX file of a variant, float32 images to float32 outputs.

        Raises:
            ConfigError: There is no such variant, or it has no such file.
            ModelError: The file is missing or damaged.
        """
        variant = self.variant(name)
        if ONNX not in variant.files:
            rule = f"must have a file for ONNX Runtime, which {self.folder} has not"
            way_out = "make the portfolio by fedsys prune run=RUN variants.onnx=true"
            raise ConfigError.of("variant", name, rule, way_out)
        return checked(self.folder / VARIANTS / name / ONNX, variant.files[ONNX])

    @classmethod
    def load(cls, folder: Path) -> Portfolio:
        """Read the manifest in `folder` and check all files against it.

        Args:
            folder: Of the portfolio, or that of ``fedsys prune``, which holds it.

        Raises:
            ModelError: The folder holds no portfolio, or a file is missing, damaged or of another
                format; names the file.
        """
        inside = folder / "portfolio"
        if inside.is_dir() and not (folder / MANIFEST).exists():
            folder = inside
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_bytes())
        except OSError as error:
            reason = error.strerror or str(error)
            raise ModelError(
                f"{folder} holds no portfolio: cannot read {path}: {reason}; "
                "make one by fedsys prune run=RUN"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is damaged: {error}; {_REMAKE}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ModelError(f"{path} is not of the format {FORMAT}")
        digest = body.pop("sha256", None)
        if digest != _digest(body):
            raise ModelError(f"{path} is damaged: its checksum does not fit; {_REMAKE}")
        try:
            about, variants = _about(body["about"]), [_variant(v) for v in body["variants"]]
            names = [variant.name for variant in variants]
            if names.count(PARENT) != 1 or len(set(names)) < len(names):
                raise ValueError(f"its variants are {names}")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} does not describe a portfolio: {error!r}") from error
        for variant in variants:
            for name, expected in variant.files.items():
                checked(folder / VARIANTS / variant.name / name, expected)
        return cls(folder, about, ordered(variants), str(digest))

    @classmethod
    def write(
        cls,
        folder: Path,
        about: About,
        variants: Sequence[tuple[Variant, Content]],
        onnx: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Portfolio:
        """Write variants and then the manifest; return the portfolio as `load` does.

        Args:
            folder: Made if need be; must hold no portfolio.
            about: What the variants have in common.
            variants: Each with what it consists of; `Variant.bytes` and `Variant.files` are filled
                in here. One of them is named `PARENT`.
            onnx: Files for ONNX Runtime beside that, by the name of the variant.

        Raises:
            ConfigError: The folder holds a portfolio, or a name cannot be that of a folder.
            ModelError: A model cannot be saved as data.
            RunError: A file cannot be written.
        """
        if (folder / MANIFEST).exists():
            way_out = "choose another folder"
            raise ConfigError.of("portfolio", folder, "must not hold a portfolio yet", way_out)
        stored = [
            _stored(folder / VARIANTS, variant, content, onnx.get(variant.name))
            for variant, content in variants
        ]
        body = {
            "format": FORMAT,
            "about": dataclasses.asdict(about),
            "variants": [dataclasses.asdict(variant) for variant in ordered(stored)],
        }
        plain = json.loads(json_text(body))
        text = json_text({"sha256": _digest(plain), **plain}, indent=1)
        write_atomic(folder / MANIFEST, (text + "\n").encode())
        return cls.load(folder)


def ordered(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """Return the most accurate first; of equals the faster, then the smaller, then by name."""

    def key(variant: Variant) -> tuple[float, float, int, str]:
        fastest = variant.p50_ms if variant.latencies else 0.0
        return -variant.accuracy, fastest, variant.bytes, variant.name

    return tuple(sorted(variants, key=key))


def checked(path: Path, expected: str) -> bytes:
    """Return the content of a file whose SHA-256 is `expected`.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"cannot read {path}: {reason}; {_REMAKE}") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise ModelError(f"{path} is damaged: its checksum does not fit; {_REMAKE}")
    return content


def _answers(module: nn.Module, about: About, folder: Path) -> nn.Module:
    """Return a variant that has scored one image of zeros.

    Raises:
        ModelError: It cannot, or its scores do not fit the classes. Checksums cannot tell that of
            files that somebody made.
    """
    import torch

    try:
        scores = run(module, torch.zeros(1, *about.input_shape))
    except Exception as error:
        raise _useless(folder, repr(error)) from error
    if not isinstance(scores, torch.Tensor) or scores.shape != (1, len(about.classes)):
        raise _useless(folder, f"there are no scores of {len(about.classes)} classes")
    return module


def _useless(folder: Path, reason: str) -> ModelError:
    return ModelError(f"{folder} does not compute scores of images: {reason}; {_REMAKE}")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _stored(folder: Path, variant: Variant, content: Content, onnx: bytes | None) -> Variant:
    """Write the files of one variant and return it with their sizes and checksums.

    What it has for ONNX Runtime besides is no part of its size: one of both is read.
    """
    from fedsys.pruning.dense import architecture

    if not _NAME.fullmatch(variant.name):
        raise ConfigError.of("variant", variant.name, "must be of letters, digits, '.', '_', '-'")
    place = folder / variant.name
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (place / ONNX).write_bytes(content)
            names = [ONNX]
        else:
            architecture.save(content, place)
            names = [WEIGHTS, ARCHITECTURE]
        contents = {name: (place / name).read_bytes() for name in names}
        if onnx is not None:
            (place / ONNX).write_bytes(onnx)
    size = sum(len(data) for data in contents.values())
    both = contents if onnx is None else {**contents, ONNX: onnx}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in both.items()}
    return dataclasses.replace(variant, bytes=size, files=digests)


# --------------------------------------------------------------------------------------------------
# From JSON


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _each(values: object, of: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list")
    return tuple(of(value) for value in values)


def _about(given: Mapping[str, Any]) -> About:
    return About(
        model=dict(given["model"]),
        classes=_each(given["classes"], _text),
        input_shape=_each(given["input_shape"], _count),
        mean=_each(given["mean"], _number),
        std=_each(given["std"], _number),
        machine=_text(given["machine"]),
        source=_text(given["source"]),
    )


def _variant(given: Mapping[str, Any]) -> Variant:
    name, precision, test = _text(given["name"]), given["precision"], given["test_accuracy"]
    files = {_text(key): _text(value) for key, value in given["files"].items()}
    of_onnx, of_ours = {ONNX}, {WEIGHTS, ARCHITECTURE}
    known = set(files) in (of_onnx, of_ours, of_onnx | of_ours)
    if not _NAME.fullmatch(name) or precision not in PRECISIONS or not known:
        raise ValueError(f"variant {name!r} of {precision!r} in {sorted(files)}")
    return Variant(
        name=name,
        accuracy=_number(given["accuracy"]),
        params=_count(given["params"]),
        macs=_count(given["macs"]),
        bytes=_count(given["bytes"]),
        peak_bytes=_count(given["peak_bytes"]),
        latencies=_each(given["latencies"], _latency),
        precision=precision,
        sparsity=_number(given["sparsity"]),
        folded=_count(given.get("folded", 0)),  # absent in portfolios made before it was
        kept=_each(given.get("kept", []), _text),
        made=_text(given["made"]),
        source=_text(given.get("source", "")),
        test_accuracy=None if test is None else _number(test),
        max_abs_diff=_number(given["max_abs_diff"]),
        max_abs_output=_number(given["max_abs_output"]),
        compared_images=_count(given.get("compared_images", 0)),
        other_answers=_count(given.get("other_answers", 0)),
        channels=_each(given["channels"], lambda c: (_text(c[0]), _count(c[1]), _count(c[2]))),
        onnx_latencies=_each(given.get("onnx_latencies", []), _latency),
        onnx_max_abs_diff=_number(given.get("onnx_max_abs_diff", 0.0)),
        files=files,
    )


def _latency(given: Mapping[str, Any]) -> Latency:
    return Latency(
        batch=_count(given["batch"]),
        threads=_count(given["threads"]),
        p50_ms=_number(given["p50_ms"]),
        p95_ms=_number(given["p95_ms"]),
        runs=_count(given["runs"]),
    )


def run(module: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs ``(batch, classes)`` of a variant, without gradients."""
    import torch

    with torch.inference_mode():
        output: Tensor = module(images)
    return output
