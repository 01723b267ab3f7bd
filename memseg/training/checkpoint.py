"""The state of a run on disk, by parameter name: written by any number of processes, read by any other number.

torch.distributed.checkpoint does the work: each process writes what it has, and a process that reads says what it
wants; what several have, as replicas do, one of them writes. So a run can be resumed on other cards, by another
strategy. A checkpoint appears under its name in one rename, after every process has written and synced its part; a run
that is killed while saving leaves a `.part` folder, and the checkpoint before it untouched.

    RUN/checkpoints/step-00000150/   tensors `model.NAME` and `optimizer.NAME.exp_avg`, ..., and `step`
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from memseg.data import ClassList
from memseg.errors import CheckpointError, MemsegError
from memseg.files import replace_file
from memseg.models import SegmentedModel, build_model
from memseg.nn.precision import parameter_dtype
from memseg.training.recipe import Recipe, parse_recipe

CHECKPOINTS_FOLDER = "checkpoints"
RECIPE_FILE = "recipe.json"
PLAN_FILE = "plan.json"
CLASSES_FILE = "classes.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class TrainedModel:
    """What a run has learnt so far."""

    model: SegmentedModel
    """In eval mode, on the CPU."""
    recipe: Recipe
    classes: ClassList
    step: int


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS_FOLDER
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def steps_of(checkpoint: Path) -> int:
    """Steps that the run had done when it wrote this checkpoint.

    >>> steps_of(Path("run/checkpoints/step-00000150"))
    150
    """
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    run: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    keep: int,
) -> Path:
    """Write a checkpoint; every process of the group calls it with its own part.

    Args:
        run: The run folder.
        step: Steps done.
        module: This process's part of the model.
        optimizer: Of its parameters.
        scaler: Of float16's gradients.
        keep: How many of the newest checkpoints stay.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    final = run / CHECKPOINTS_FOLDER / f"step-{step:08d}"
    part = final.with_name(f"{final.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    state = _state(module, optimizer) | _scaler_state(scaler) | {"step": torch.tensor(step)}
    try:
        dcp_save(state, storage_writer=_Writer(part, sync_files=True))
    except CheckpointException as error:
        raise _disk_error(error, part) from None
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync_folder(final.parent)
        for old in checkpoint_folders(run)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> int:
    """Fill this process's part of the model and its optimizer's state, which must exist; the steps done.

    Raises:
        CheckpointError: the checkpoint is damaged, or was made by another model.
    """
    state = _state(module, optimizer) | _scaler_state(scaler) | {"step": torch.tensor(0)}
    _load(state, folder, no_dist=False)
    if scaler is not None and scaler.is_enabled():
        scale, steps = state["scaler.scale"].item(), int(state["scaler.steps"])
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": steps})
    return int(state["step"])


def load_trained(path: Path) -> TrainedModel:
    """The newest checkpoint of a run folder, or a checkpoint folder, as a model that can be used.

    Raises:
        CheckpointError: there is no run, no checkpoint in it, or it is damaged.
    """
    path = path.resolve()
    run = path.parent.parent if path.parent.name == CHECKPOINTS_FOLDER else path
    recipe, classes = load_run(run)
    folders = [path] if run is not path else checkpoint_folders(run)
    if not folders or not folders[-1].is_dir():
        raise CheckpointError(f"{path}: holds no checkpoint yet; train it first: memseg train")
    dtype = parameter_dtype(recipe.train.precision)
    model = build_model(recipe.model.name, num_classes=len(classes.names), norm=recipe.model.norm, dtype=dtype)
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["step"] = torch.tensor(0)
    _load(state, folders[-1], no_dist=True)
    return TrainedModel(model.eval(), recipe, classes, int(state["step"]))


def load_run(run: Path) -> tuple[Recipe, ClassList]:
    """What a run folder says of its run.

    Raises:
        CheckpointError: it is not a run folder, or its files are damaged.
    """
    try:
        recipe = parse_recipe(json.loads((run / RECIPE_FILE).read_text(encoding="utf-8")), str(run / RECIPE_FILE))
        stored = json.loads((run / CLASSES_FILE).read_text(encoding="utf-8"))
        return recipe, ClassList(tuple(stored["names"]), tuple((r, g, b) for r, g, b in stored["colours"]))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{run}: must be a run folder as memseg train makes it, {error.filename} is missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run}: the run's description is damaged: {error}") from None


def write_run(run: Path, recipe: Recipe, classes: ClassList) -> None:
    """Describe a run in its folder, for workers, for resuming and for using what it learns."""
    run.mkdir(parents=True, exist_ok=True)
    replace_file(run / RECIPE_FILE, recipe.to_json())
    replace_file(run / CLASSES_FILE, json.dumps(asdict(classes), indent=2) + "\n")


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def _scaler_state(scaler: torch.amp.GradScaler | None) -> dict[str, Tensor]:
    """The scale, and the steps since it last changed."""
    if scaler is None or not scaler.is_enabled():
        return {}
    state = scaler.state_dict()
    return {
        "scaler.scale": torch.tensor(state["scale"], dtype=torch.float64),
        "scaler.steps": torch.tensor(state["_growth_tracker"]),
    }


def _load(state: dict[str, Tensor], folder: Path, *, no_dist: bool) -> None:
    try:
        with warnings.catch_warnings():
            # That it reads in a single process is what `no_dist` asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = FileSystemReader(folder)
            # Read once for itself: where the index is missing, loading would log a traceback before it fails.
            reader.read_metadata()
            dcp_load(state, storage_reader=reader, no_dist=no_dist)
    except MemsegError:
        raise
    except (Exception, CheckpointException) as error:  # the second is no Exception
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(
            f"{folder}: the checkpoint is damaged or of another model ({reason[0]}); use an earlier one or train again"
        ) from None


class _Writer(FileSystemWriter):
    """As torch's, but a disk that refuses to write is told of by the system's own error.

    torch.save, broken off by the disk, complains about its unfinished archive and has the reason only as its context,
    which does not survive being sent to the other processes.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _disk_error(error: CheckpointException, part: Path) -> BaseException:
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return OSError(failure.errno, failure.strerror or str(failure), str(part))
    return error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
