"""The installation and the machine: versions, processor, memory, disk."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from fedsys.commands.doctor.checks import Check
from fedsys.config import Config
from fedsys.identity import has_bfloat16
from fedsys.offload.processors import usable_cores

MB = 2**20
LEAST_MEMORY, GOOD_MEMORY = 512 * MB, 2048 * MB
GOOD_DESCRIPTORS = 8192
LEAST_DISK, GOOD_DISK = 50 * MB, 1024 * MB


def installation() -> Iterator[Check]:
    """Check Python and every package that fedsys requires, and that torch's parts fit together."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    try:
        required = metadata.requires("fedsys") or []
    except metadata.PackageNotFoundError:
        told = "fedsys runs from this folder without being installed"
        yield Check("packages", "warn", told, "pip install -e .")
        required = []
    yield from packages(required)
    yield from (_imports(name) for name in ("torch", "torchvision", "flwr"))


def packages(required: Iterable[str]) -> Iterator[Check]:
    """Compare installed versions with requirements such as ``flwr<2,>=1.41``."""
    from packaging.requirements import Requirement

    found: list[str] = []
    for text in required:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        way_out = f'pip install "{need.name}{need.specifier}"'
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield Check("package", "fail", f"{need.name} is not installed", way_out)
            continue
        if not need.specifier.contains(version, prereleases=True):
            rule = f"{need.name} {version} is installed, {need.specifier} is needed"
            yield Check("package", "fail", rule, way_out)
        elif need.name in ("flwr", "torch", "torchvision", "hydra-core"):
            found.append(f"{need.name} {version}")
    if found:
        yield Check("packages", "ok", ", ".join(found))


def _imports(name: str) -> Check:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary raises whatever it likes; here it is the finding
        reason = (
            f"{name} cannot be imported: {str(error).splitlines()[0] if str(error) else error!r}"
        )
        way_out = "install torch and torchvision together, from one index, without pins"
        if name == "flwr":
            way_out = 'pip install "flwr[simulation]"'
        return Check(f"import {name}", "fail", reason, way_out)
    return Check(f"import {name}", "ok", "it works")


def processor(config: Config) -> Iterator[Check]:
    """Check instruction set, cores and threads."""
    import torch

    kind = torch.backends.cpu.get_cpu_capability()
    told = f"{kind}; machines that are to agree to the bit must all have it"
    if kind == "DEFAULT":
        way_out = "unset ATEN_CPU_CAPABILITY, or use a processor with AVX2"
        yield Check(
            "instruction set", "warn", "plain instructions only, several times slower", way_out
        )
    else:
        yield Check("instruction set", "ok", told)
    cores = usable_cores()
    wanted = config.runtime.workers or max(1, cores // config.client.threads)
    wanted = min(wanted, config.num_clients) * config.client.threads
    each = config.client.threads
    told = f"{wanted} threads train on {cores} cores; bits depend on client.threads={each}"
    if wanted > cores:
        way_out = f"runtime.workers={max(1, cores // each)}"
        yield Check("threads", "warn", told, way_out)
    else:
        yield Check("threads", "ok", told)


def kernels(config: Config) -> Check:
    """Check what fused kernels need, and build them if the run asks for them."""
    from fedsys.models.fused import built, compiler

    if config.client.kernels != "fused":
        found = compiler()
        if not found:
            return Check("kernels", "ok", "no C compiler, so client.kernels=fused computes plainly")
        return Check("kernels", "ok", f"client.kernels=fused would be built by {found[0]}")
    done = built()
    if done.library is None:
        told = f"client.kernels=fused computes plainly, with other bits: {done.detail}"
        return Check("kernels", "warn", told, "install a C compiler, or client.kernels=plain")
    return Check("kernels", "ok", f"client.kernels=fused, built by {done.detail}")


def precision(config: Config) -> Check:
    """Check that the processor has instructions for bfloat16, if the run computes in it."""
    from fedsys.training.precision import types_by

    there = has_bfloat16()
    known = {True: "has", False: "has no", None: "does not say whether it has"}[there]
    told = f"this processor {known} instructions for bfloat16 (client.precision=bf16)"
    client = config.client
    if client.precision == "bf16" and there is False and types_by(client) == "cpu":
        return Check("precision", "warn", f"{told}: it may be slower", "client.precision=fp32")
    return Check("precision", "ok", told)


def load(average: float | None = None) -> Check:
    """Check that the machine has time left.

    Args:
        average: Processes that want a core; None for those of the last minute.
    """
    average = os.getloadavg()[0] if average is None else average
    cores = usable_cores()
    told = f"{average:.1f} processes want one of {cores} cores"
    if average > 2 * cores:
        way_out = (
            "end other work; `flwr run` gives its SuperLink 15 s to start: start it beforehand, "
            "as the README says"
        )
        return Check("load", "warn", told, way_out)
    return Check("load", "ok", told)


def memory() -> Check:
    """Check the memory that is left, for this container where there is a limit."""
    import psutil

    left = int(psutil.virtual_memory().available)
    limit = _cgroup("memory.max")
    if limit is not None:
        left = min(left, limit - (_cgroup("memory.current") or 0))
    told = f"{left / 2**30:.1f} GiB are free"
    if left < LEAST_MEMORY:
        way_out = "end other processes; runtime.workers=1 needs the least memory"
        return Check("memory", "fail", told, way_out)
    if left < GOOD_MEMORY:
        return Check("memory", "warn", told, "runtime.workers=1 needs the least memory")
    return Check("memory", "ok", told)


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def descriptors(hard: int | None = None) -> Check:
    """Check how many connections the system allows this process.

    Args:
        hard: Largest number of descriptors that it may ask for; None for that of the system.
    """
    if hard is None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    unlimited = hard == resource.RLIM_INFINITY
    told = f"{'any number of' if unlimited else f'{hard:,}'} open files and connections"
    if not unlimited and hard < GOOD_DESCRIPTORS:
        way_out = (
            f"an edge server wants {GOOD_DESCRIPTORS:,} and takes fewer links with less: "
            "ulimit -n, LimitNOFILE= of its unit, or ulimits of its container"
        )
        return Check("descriptors", "warn", f"{told} at most", way_out)
    return Check("descriptors", "ok", told)


def disk(folder: Path) -> Check:
    """Check that results can be written to `folder`, which need not exist, and how much fits."""
    home = folder
    while not home.exists():
        home = home.parent
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        told = f"{home} cannot be written to: {error.strerror}"
        return Check("results", "fail", told, "choose another folder with run.dir=")
    left = shutil.disk_usage(home).free
    told = f"{left / 2**30:.1f} GiB are free for {folder}"
    if left < GOOD_DISK:
        status = "fail" if left < LEAST_DISK else "warn"
        way_out = "free some space, or choose another folder with run.dir="
        return Check("results", "fail" if status == "fail" else "warn", told, way_out)
    return Check("results", "ok", told)
