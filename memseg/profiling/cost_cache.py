"""Costs on disk, so that a step is profiled once.

Profiling a large network takes tens of seconds, and people plan the same one again and again: other cards, another
strategy. Costs depend on little, and all of it is known beforehand: what is asked for, the network, torch, and that
code of ours that runs or counts the step. So they are kept by a digest of all that. Whoever changes any of it, a line
of ours included, finds nothing and profiles anew; nothing has to be invalidated by hand.

A cache is a help and never a reason to fail: what cannot be read is profiled, what cannot be written is not kept.
"""

import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from memseg import models, profiling
from memseg import nn as memseg_nn
from memseg.errors import MemsegError
from memseg.files import replace_file
from memseg.levels import NormMode, Precision
from memseg.models.segmented import SegmentedModel
from memseg.planning import costs as planning_costs
from memseg.planning import roofline
from memseg.planning.costs import ModelCosts
from memseg.profiling.costs import model_costs
from memseg.profiling.jobs.job import OptimizerFactory, fused_adam

MOST_FILES = 500
"""Kept, the newest; each is 20 to 200 kB."""

_TOLD_BY_VERSION = ("torch", "memseg", "builtins", "_operator", "operator", "math")
"""Packages whose code is told by other parts of the key, or by nothing that changes without torch."""
_SOURCES = (memseg_nn, models, profiling, planning_costs, roofline)
"""Packages and modules whose code decides about costs."""


def cached_model_costs(
    build: Callable[[], SegmentedModel],
    *,
    image: tuple[int, int],
    batch: int,
    norm: NormMode = NormMode.BATCH,
    aux_weight: float = 0.3,
    optimizer: tuple[str, OptimizerFactory] = ("fused_adam", fused_adam),
    precision: Precision = Precision.FLOAT32,
    device: str = "cpu",
    replicas: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    complain: Callable[[str], None] = lambda problem: None,
) -> ModelCosts:
    """What `model_costs` returns, from the cache where it is there.

    Args:
        build, image, batch, norm, aux_weight, precision, device, replicas: As for `model_costs`.
        progress: As there; not called for what is found.
        optimizer: Makes the optimizer, and a name that stands for it with all its settings.
        complain: Called with a line of text where costs could not be kept.

    Raises:
        InputError: the model cannot take images of that size.
    """
    asked = {
        "image": list(image),
        "batch": batch,
        "norm": norm.value,
        "aux_weight": aux_weight,
        "optimizer": optimizer[0],
        "precision": precision.value,
        "device": device,
        "replicas": replicas > 1,
    }
    digest = _digest(asked, build)
    path = cache_folder() / f"{digest}.json"
    found = _read(path) if digest else None
    if found is not None:
        return found
    costs = model_costs(
        build,
        image=image,
        batch=batch,
        norm=norm,
        aux_weight=aux_weight,
        optimizer=optimizer[1],
        precision=precision,
        device=device,
        replicas=replicas,
        progress=progress,
    )
    if not digest:
        return costs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, costs.to_json())
        _drop_oldest(path.parent)
    except OSError as error:
        complain(f"costs are not kept for the next time: {path.parent}: {error.strerror}")
    return costs


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/memseg, by default ~/.cache/memseg.

    Source: XDG Base Directory Specification 0.8; a path in it that is not absolute does not count.
    """
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (asked if asked.is_absolute() else Path("~/.cache").expanduser()) / "memseg"


def _read(path: Path) -> ModelCosts | None:
    """The costs in a file; None where there is none, or none that can be used."""
    try:
        return ModelCosts.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, MemsegError):
        return None


def _drop_oldest(folder: Path) -> None:
    """Another process may do the same at the same time."""

    def age(path: Path) -> float:
        try:
            return -path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    for path in sorted(folder.glob("*.json"), key=age)[MOST_FILES:]:
        path.unlink(missing_ok=True)


def _digest(asked: dict[str, Any], build: Callable[[], SegmentedModel]) -> str | None:
    """Of everything that decides about costs; None where code that does has no source to be read."""
    with FakeTensorMode():
        model = build()
    sources = _sources(model)
    if sources is None:
        return None
    known = {
        "asked": asked,
        "model": list(_fingerprint(model)),
        "machine": _machine(asked["device"]),
        "code": _code_digest(),
        "memseg": version("memseg"),
        "torch": torch.__version__,
        "sources": sources,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _machine(device: str) -> list[Any]:
    """What scratch of kernels depends on; bands are planned for a number of threads too, wherever they will run."""
    return [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), platform.machine(), device]


@cache
def _code_digest() -> str:
    found = hashlib.sha256()
    for module in _SOURCES:
        path = Path(module.__file__ or "")
        for source in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            found.update(f"{source.relative_to(path.parent)}\0{source.stat().st_size}\0".encode())
            found.update(source.read_bytes())
    return found.hexdigest()


def _fingerprint(model: SegmentedModel) -> Iterator[Any]:
    """A network as far as it can be told: what it is called, its graph, its modules with their settings, its tensors.

    What is told of each module is its class, what it prints and its plain attributes; of a traced graph its code. What
    else the code of others does is told by `_sources`.
    """
    yield [model.name, model.num_classes, model.output_stride, list(model.outputs)]
    yield [[name, list(reads)] for name, reads in model.reads.items()]
    for name, module in model.named_modules():
        yield [name, *_told(module)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield [name, list(tensor.shape), list(tensor.stride()), str(tensor.dtype), tensor.requires_grad]


def _sources(model: SegmentedModel) -> list[str] | None:
    """A digest of each file that has a class of the network's modules, or a function that a traced graph calls.

    torch and memseg are told by their own keys. None where there is no such file.
    """
    owners: set[Any] = {type(module) for module in model.modules()}
    for module in model.modules():
        if isinstance(graph := getattr(module, "graph", None), Graph):
            owners |= {node.target for node in graph.nodes if node.op == "call_function"}
    digests = set()
    for owner in owners:
        package = (getattr(owner, "__module__", None) or "torch").partition(".")[0]
        if package in _TOLD_BY_VERSION:
            continue
        try:
            digests.add(hashlib.sha256(Path(inspect.getsourcefile(owner) or "").read_bytes()).hexdigest())
        except (OSError, TypeError):
            return None
    return sorted(digests)


def _told(module: nn.Module) -> Iterator[str]:
    kind = type(module)
    yield f"{kind.__module__}.{kind.__qualname__}"
    yield module.extra_repr()
    if isinstance(graph := getattr(module, "graph", None), Graph):
        yield graph.python_code("self").src
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)}
    yield repr(sorted(plain.items()))
