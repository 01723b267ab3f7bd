"""The state of a run on disk, by parameter name: written by any number of processes, read by any other number.

torch.distributed.checkpoint does the work: each process writes what it has, and a process that reads says what it
wants; what several have, as replicas do, one of them writes. So a run can be resumed on other cards, by another
strategy. A checkpoint appears under its name in one rename, after every process has written and synced its part; a run
that is killed while saving leaves a `.part` folder, and the checkpoint before it untouched.

    RUN/checkpoints/step-00000150/   tensors `model.NAME` and `optimizer.NAME.exp_avg`, ..., and `step`
    RUN/best.json                    which of them had the best score: its step, and the score

The best one stays when others are deleted, and the file names a checkpoint that is there already: what it named before
is deleted after it was written.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
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
from memseg.training.standing import Standing
from memseg.training.tables import UNWEIGHTED

CHECKPOINTS_FOLDER = "checkpoints"
RECIPE_FILE = "recipe.json"
PLAN_FILE = "plan.json"
CLASSES_FILE = "classes.json"
CLASS_WEIGHTS_FILE = "class_weights.json"
RESULT_FILE = "result.json"
BEST_FILE = "best.json"
LAST, BEST = "last", "best"
"""Names that a checkpoint goes by."""


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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    run: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    keep: int,
    standing: Standing | None = None,
) -> Path:
    """Write a checkpoint; every process of the group calls it with its own part.

    Args:
        run: The run folder.
        step: Steps done.
        module: This process's part of the model.
        optimizer: Of its parameters.
        scaler: Of float16's gradients.
        keep: How many of the newest checkpoints stay, beside the best one.
        standing: Of the evaluations up to this step, which names the best; None if there are none.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    final = run / CHECKPOINTS_FOLDER / _name(step)
    part = final.with_name(f"{final.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    state = _state(module, optimizer) | _scaler_state(scaler) | {"step": torch.tensor(step)}
    try:
        dcp_save(state, storage_writer=_Writer(part, sync_files=True))
    except CheckpointException as error:
        if dist.get_rank() == 0:
            # Nobody writes there any more, and what little room there is, is needed to say what happened.
            shutil.rmtree(part, ignore_errors=True)
        raise _disk_error(error, part) from None
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync_folder(final.parent)
        standing = standing or Standing()
        write_best(run, standing)
        for old in checkpoint_folders(run)[:-keep]:
            if steps_of(old) != standing.best_step:
                shutil.rmtree(old)
    dist.barrier()
    return final


def write_best(run: Path, standing: Standing) -> None:
    """Name the best checkpoint of a run, which is there already; none before the first evaluation.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    if standing.best_step is None:
        (run / BEST_FILE).unlink(missing_ok=True)
        return
    told = {"step": standing.best_step, "miou": standing.best_miou, "checkpoint": _name(standing.best_step)}
    replace_file(run / BEST_FILE, json.dumps(told, indent=2) + "\n")


def find_checkpoint(run: Path, which: str = LAST) -> Path:
    """The folder of one of a run's checkpoints.

    Args:
        run: The run folder.
        which: "last", "best" by its score in the evaluations during training, or a checkpoint's folder or its name.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    folders = checkpoint_folders(run)
    if not folders:
        raise CheckpointError(f"{run}: holds no checkpoint yet; train it first: memseg train")
    if which == LAST:
        return folders[-1]
    if which != BEST:
        wanted = (Path(which).resolve(), (run / CHECKPOINTS_FOLDER / which).resolve())
        if found := next((folder for folder in folders if folder.resolve() in wanted), None):
            return found
        raise CheckpointError(
            f"a checkpoint of {run} must be last, best or one of {', '.join(folder.name for folder in folders)}, "
            f"got {which}"
        )
    try:
        best = run / CHECKPOINTS_FOLDER / str(json.loads((run / BEST_FILE).read_text(encoding="utf-8"))["checkpoint"])
    except FileNotFoundError:
        raise CheckpointError(f"{run}: was never evaluated in training, so none is its best; take the last") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run / BEST_FILE}: is damaged: {error}; take the last checkpoint") from None
    if not best.is_dir():
        raise CheckpointError(f"{run}: its best checkpoint was {best.name}, which is there no more; take the last")
    return best


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


def load_trained(path: Path, checkpoint: str = LAST) -> TrainedModel:
    """A checkpoint as a model that can be used.

    Args:
        path: A run folder, or the folder of one of its checkpoints, which is taken then.
        checkpoint: Of a run folder, as for `find_checkpoint`.

    Raises:
        CheckpointError: there is no run, no such checkpoint in it, or it is damaged.
    """
    path = path.resolve()
    run = path.parent.parent if path.parent.name == CHECKPOINTS_FOLDER else path
    recipe, classes = load_run(run)
    if run is not path and not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint; {run} says which it has")
    folder = path if run is not path else find_checkpoint(run, checkpoint)
    dtype = parameter_dtype(recipe.train.precision)
    model = build_model(recipe.model.name, num_classes=len(classes.names), norm=recipe.model.norm, dtype=dtype)
    step = load_weights(folder, model)
    return TrainedModel(model.eval(), recipe, classes, step)


def load_weights(folder: Path, model: nn.Module) -> int:
    """Fill a whole model from a checkpoint, without other processes; the steps that it had done.

    Raises:
        CheckpointError: the checkpoint is damaged, or was made by another model.
    """
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["step"] = torch.tensor(0)
    _load(state, folder, no_dist=True)
    return int(state["step"])


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shape of each tensor of the model that a checkpoint holds.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise _damaged(folder, error) from None
    return {
        name.removeprefix("model."): tensor.size
        for name, tensor in stored.items()
        if name.startswith("model.") and isinstance(tensor, TensorStorageMetadata)
    }


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


def write_run(
    run: Path, recipe: Recipe, classes: ClassList, class_weights: Sequence[float] | None = None
) -> None:  # fmt: skip
    """Describe a run in its folder, for workers, for resuming and for using what it learns.

    Args:
        run: The folder, made if absent.
        recipe: Of the run.
        classes: That it learns.
        class_weights: In its loss; None where pixels count alike.
    """
    run.mkdir(parents=True, exist_ok=True)
    replace_file(run / RECIPE_FILE, recipe.to_json())
    replace_file(run / CLASSES_FILE, json.dumps(asdict(classes), indent=2) + "\n")
    if class_weights is None:
        (run / CLASS_WEIGHTS_FILE).unlink(missing_ok=True)
    else:
        weights = dict(zip(classes.names, class_weights, strict=True))
        replace_file(run / CLASS_WEIGHTS_FILE, json.dumps(weights, indent=2) + "\n")


def read_class_weights(run: Path, recipe: Recipe) -> Sequence[float] | None:
    """Those in the loss of a run, in the order of the classes; None where pixels count alike.

    Raises:
        CheckpointError: the recipe wants them from the data, and `write_run` was given none, or its file is damaged.
    """
    wanted, path = recipe.loss.class_weights, run / CLASS_WEIGHTS_FILE
    if wanted == UNWEIGHTED:
        return None
    if not isinstance(wanted, str):
        return wanted
    try:
        return [float(weight) for weight in json.loads(path.read_text(encoding="utf-8")).values()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: must hold a weight for each class: {error}; train again") from None


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
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return CheckpointError(
        f"{folder}: the checkpoint is damaged or of another model ({reason[0]}); use an earlier one or train again"
    )


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
