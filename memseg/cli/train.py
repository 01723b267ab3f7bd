"""memseg train: a recipe carried out on the cards of a plan."""

import argparse
import fcntl
import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memseg.cli.console import add_command, print_columns, print_json, progress_bar
from memseg.cli.nodes import add_nodes_options, nodes_of
from memseg.cli.planning import PlanRequest, add_cards_options
from memseg.errors import InputError, MemsegError, RunFailedError
from memseg.units import format_bytes

if TYPE_CHECKING:
    from memseg.data import ClassList, SegmentationDataset
    from memseg.models import LoadReport
    from memseg.planning import Plan
    from memseg.running import Nodes
    from memseg.training.recipe import Recipe

_SHOW_CURSOR = "\x1b[?25h"
"""DECTCEM of VT220, as all terminals have it."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "train",
        run,
        summary="Train a recipe on one process per card, as planned.",
        examples=[
            "memseg train streets_demo",
            "memseg train ldn121_cityscapes --set data.root=/data/cityscapes --cards gtx1070,titanx",
            "memseg train my.toml --set train.batch=4 --plan plan.json --out runs/mine",
            "memseg train --resume runs/mine",
            "memseg train my.toml --plan plan.json --nnodes 2 --node-rank 0 --master-addr 10.0.0.1",
        ],
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a .toml file, or a name memseg recipes lists")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a value of the recipe, such as train.batch=4; may be given again",
    )
    add_cards_options(parser, required=False)
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan from memseg plan -o, instead of a new one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run from its last checkpoint")
    parser.add_argument("--force", action="store_true", help="run what is predicted not to fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the result")
    add_nodes_options(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, train, and print predicted beside measured peaks; 0.

    Raises:
        MemsegError: what stopped the run, in one line.
    """
    from memseg.inference.labelling import Framing
    from memseg.training.checkpoint import checkpoint_folders, load_run
    from memseg.training.recipe import load_recipe, override_recipe

    if bool(args.recipe) == bool(args.resume):
        raise InputError("give either a recipe to begin with, or --resume with the folder of a run")
    if args.resume and args.out:
        raise InputError(f"a run goes on in its own folder, {args.resume}; leave out --out")
    nodes = nodes_of(args)
    begun = None
    if args.resume:
        folder: Path = args.resume
        begun, classes = load_run(folder)
        recipe = override_recipe(begun, args.overrides)
        _check_continues(recipe, begun)
    else:
        recipe = load_recipe(args.recipe, args.overrides)
        folder = args.out or Path("runs") / recipe.name
        if checkpoint_folders(folder):
            raise InputError(f"{folder} holds a run already; go on with --resume {folder}, or give another --out")
    dataset = recipe.data.open_train()
    if args.resume and dataset.classes.names != classes.names:
        raise InputError(f"{folder} learns {', '.join(classes.names)}; go on with a data set of the same classes")
    if recipe.train.evaluate_every:
        Framing.of(recipe.data).check(recipe.data.open_val())
    _check(recipe, dataset, folder)
    fresh = not args.resume or args.plan or args.cards or args.strategy
    if args.resume and not fresh:
        plan = _stored_plan(folder, recipe, len(dataset.classes.names))
    else:
        plan = plan_for(
            recipe,
            len(dataset.classes.names),
            args.plan,
            args.cards,
            args.strategy,
            nodes=nodes.count,
            force=args.force,
        )
    _check_places(plan, nodes)
    if not (plan.feasible or args.force):
        raise InputError(_why_not(plan))
    weights = _class_weights(folder, recipe, begun, dataset) if nodes.is_first else None
    result = train(folder, plan, recipe, dataset.classes, nodes, class_weights=weights)
    if args.json:
        print_json(result)
    else:
        print_result(result, folder)
    return 0


def train(
    folder: Path,
    plan: "Plan",
    recipe: "Recipe",
    classes: "ClassList",
    nodes: "Nodes | None" = None,
    *,
    class_weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Carry out a run in its folder, from its last checkpoint where there is one; what its processes found.

    Args:
        folder: Of the run; with several machines, on a file system that they share. The first of them writes it.
        plan: What every machine carries out.
        recipe: Of the run.
        classes: That it learns.
        nodes: The machines; None for this one alone.
        class_weights: In the loss; None where pixels count alike.

    Raises:
        MemsegError: what stopped it.
        KeyboardInterrupt: the user did.
    """
    from memseg.cli.worker import ERROR_FILE
    from memseg.planning import save_plan
    from memseg.running import Nodes
    from memseg.training.checkpoint import PLAN_FILE, RESULT_FILE, write_run

    nodes = nodes or Nodes()
    if not nodes.is_first:
        return _launch(folder, plan, recipe, nodes)
    with _locked(folder):
        write_run(folder, recipe, classes, class_weights)
        save_plan(plan, folder / PLAN_FILE)
        for name in (ERROR_FILE, RESULT_FILE):
            (folder / name).unlink(missing_ok=True)
        return _launch(folder, plan, recipe, nodes)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other command trains in the folder, which is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is being trained by another process; wait for it, or give another --out"
            ) from None
        yield


def _launch(folder: Path, plan: "Plan", recipe: "Recipe", nodes: "Nodes") -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from memseg.cli.worker import ERROR_FILE
    from memseg.running import launch
    from memseg.training.checkpoint import RESULT_FILE

    mine = [card for card in plan.cards if card.node == nodes.rank]
    # A split whose micro-batches are one takes turns.
    at_once = len(mine) if plan.micro_batches > 1 else len({card.replica for card in mine})
    digest = hashlib.sha256(f"{recipe.to_json()}{plan.to_json()}".encode()).hexdigest()
    print(f"training on {', '.join(card.card for card in mine)} in {folder}", file=sys.stderr)
    try:
        code = launch("memseg.cli.worker", [str(folder), digest], processes=len(mine), at_once=at_once, nodes=nodes)
    except (SignalException, KeyboardInterrupt):
        _leave_panel()
        raise KeyboardInterrupt(f"interrupted; go on with memseg train --resume {folder}") from None
    except ConnectionError as error:
        raise RunFailedError(
            f"machine {nodes.rank} of {nodes.count} did not meet the others at {nodes.address}:{nodes.port} ({error}); "
            "start the same command on all of them, and check the address and that the port is free"
        ) from None
    if code:
        _leave_panel()
        error_file = folder / ERROR_FILE
        if reason := error_file.read_text(encoding="utf-8") if error_file.exists() else "":
            raise MemsegError(reason)
        ended = f"ended with exit code {code}"
        if code - 128 in signal.valid_signals():
            ended = f"was ended by {signal.Signals(code - 128).name}, near a memory limit the likely cause"
        raise RunFailedError(
            f"a process {ended}; it did not say why in {folder}; go on with memseg train --resume {folder}"
        )
    result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def _leave_panel() -> None:
    """Below what a worker drew, which had no time to do so itself, with the cursor shown again."""
    if sys.stderr.isatty():
        print(_SHOW_CURSOR, file=sys.stderr)


def plan_for(
    recipe: "Recipe",
    num_classes: int,
    plan_file: Path | None,
    cards: str | None,
    strategy: str | None,
    *,
    nodes: int = 1,
    force: bool = False,
) -> "Plan":
    """The plan in a file, checked against the recipe, or a new one.

    Args:
        recipe: What is to be trained.
        num_classes: That it learns.
        plan_file: Of the plan; None for a new one.
        cards: For a new one; None for those of the recipe.
        strategy: Likewise.
        nodes: Machines that a new one is for.
        force: Whether a new one may be one that does not fit.

    Raises:
        PlanError: the file's plan was made for something else.
        InputError: no cards are named.
        NothingFitsError: no plan fits.
    """
    from memseg.planning import load_plan, parse_cards

    if plan_file:
        if cards or strategy:
            raise InputError("--plan names cards and strategy already; leave out --cards and --strategy")
        plan = load_plan(plan_file)
        _check_plan(plan, recipe, num_classes)
        return plan
    names = cards or recipe.run.cards
    if not names:
        raise InputError(f"the recipe {recipe.name} names no cards; give --cards, for example --cards cpu:8GiB")
    request = PlanRequest(
        model=recipe.model.name,
        num_classes=num_classes,
        image=recipe.data.image,
        batch=recipe.train.batch,
        accumulation=recipe.train.accumulation,
        norm=recipe.model.norm,
        precision=recipe.train.precision,
        loaders=recipe.train.workers,
        aux_weight=recipe.loss.aux_weight,
        cards=parse_cards(names),
        nodes=nodes,
        optimizer=recipe.optimizer.kind,
    )
    return request.plan(strategy or recipe.run.strategy, force=force)


def print_result(result: dict[str, Any], folder: Path) -> None:
    """Predicted beside measured peaks, and where everything lies."""
    # What is outside torch's allocator is predicted, where it is, but cannot be measured by it.
    outside = any(card["outside_bytes"] for card in result["cards"])
    rows: list[Sequence[str]] = [
        ("card", "predicted peak", *(["and outside torch"] if outside else []), "measured peak", "difference")
    ]
    for card in result["cards"]:
        predicted, measured = card["predicted_peak_bytes"], card["measured_peak_bytes"]
        difference = f"{predicted / measured - 1:+.2%}" if measured else "not measured"
        beside = [format_bytes(card["outside_bytes"])] if outside else []
        rows.append((card["card"], format_bytes(predicted), *beside, format_bytes(measured), difference))
    print_columns(rows)
    stopped = ", stopped early" if result["stopped_early"] else ""
    best = result["best"]
    scored = f", best val mIoU {best['miou']:.2%} at step {best['step']}" if best else ""
    print(f"\n{result['steps']} steps{stopped}, last loss {result['loss']:.4f}{scored}; everything lies in {folder}")


def _check_places(plan: "Plan", nodes: "Nodes") -> None:
    """Refuse a plan for other machines than those that take part."""
    if plan.nodes != nodes.count:
        raise InputError(
            f"the plan is for {plan.nodes} machine{'s' if plan.nodes > 1 else ''}, --nnodes says {nodes.count}; "
            f"give --nnodes {plan.nodes}, or make a plan for {nodes.count}"
        )


def _why_not(plan: "Plan") -> str:
    """Which card of a plan has the least room, in one line."""
    card = max(plan.cards, key=lambda one: one.needed_bytes - one.available_bytes)
    return (
        f"the plan predicts {format_bytes(card.needed_bytes)} on {card.card}, which has "
        f"{format_bytes(card.available_bytes)}; --force runs it anyway"
    )


def _check_continues(recipe: "Recipe", begun: "Recipe") -> None:
    """Refuse overrides that would make another network of a run."""
    kept = ((one.model, one.train.precision, one.optimizer.kind) for one in (recipe, begun))
    if next(kept) != next(kept):
        raise InputError(
            "a run goes on with the model, the precision and the optimizer it began with; begin a new one for others"
        )


def _class_weights(
    folder: Path, recipe: "Recipe", begun: "Recipe | None", dataset: "SegmentationDataset"
) -> Sequence[float] | None:
    """Of the loss: as the recipe has them, as the run had them when it began, or from all labels."""
    from memseg.data import class_weights
    from memseg.training.checkpoint import read_class_weights
    from memseg.training.tables import UNWEIGHTED

    wanted = recipe.loss.class_weights
    is_scheme = isinstance(wanted, str) and wanted != UNWEIGHTED
    if is_scheme and not (begun and begun.loss.class_weights == wanted):
        with progress_bar("class weights") as progress:
            return class_weights(dataset, str(wanted), progress)
    return read_class_weights(folder, recipe)


def _check(recipe: "Recipe", dataset: "SegmentationDataset", folder: Path) -> None:
    import torch

    from memseg.models import build_model, check_pretrained
    from memseg.training.checkpoint import checkpoint_folders, steps_of
    from memseg.training.initial import check_initial_weights
    from memseg.training.log import read_metrics
    from memseg.training.standing import Standing
    from memseg.training.trainer import training_length

    with torch.device("meta"):
        model = build_model(recipe.model.name, num_classes=len(dataset.classes.names), norm=recipe.model.norm)
    if not model.is_dense:
        raise InputError(
            f"model.name must name a network that labels pixels, {recipe.model.name} gives one label to an image; "
            "memseg plan and memseg profile take it, memseg train does not"
        )
    model.check_image(recipe.data.image, batch=recipe.train.batch)
    recipe.data.training_view(dataset, seed=recipe.train.seed)
    numbers, classes = recipe.loss.class_weights, dataset.classes.names
    if not isinstance(numbers, str) and len(numbers) != len(classes):
        raise InputError(
            f"loss.class_weights must have a number for each of the {len(classes)} classes {', '.join(classes)}, "
            f"got {len(numbers)}"
        )
    _, total_steps = training_length(recipe, len(dataset))
    checkpoints = checkpoint_folders(folder)
    done = steps_of(checkpoints[-1]) if checkpoints else 0
    standing = Standing.of(read_metrics(folder), done)
    if standing.ends(recipe.train.early_stop):
        raise InputError(
            f"the run has ended after {done} steps, as {standing.since_best} evaluations found nothing better; "
            "to go on all the same give --set train.early_stop=0"
        )
    if done >= total_steps:
        raise InputError(
            f"the run has done {done} of {total_steps} steps, nothing is left; "
            f"for more give --set schedule.steps={2 * done}"
        )
    if recipe.model.initial_weights and not done:
        check_initial_weights(recipe.model.initial_weights, model)
    if (weights := recipe.model.encoder_weights) and not done:
        report = check_pretrained(model, weights, progress=sys.stderr.isatty())
        print(_pretrained_line(weights, report), file=sys.stderr)


def _pretrained_line(weights: str, report: "LoadReport") -> str:
    parts = [f"{weights}: {len(report.loaded)} keys loaded"]
    if report.new:
        parts.append(f"new are {', '.join(report.new)}")
    if report.ignored:
        more = f" and {len(report.ignored) - 8} more" if len(report.ignored) > 8 else ""
        parts.append(f"ignored {', '.join(report.ignored[:8])}{more}")
    return "; ".join(parts)


def _check_plan(plan: "Plan", recipe: "Recipe", num_classes: int) -> None:
    import torch

    from memseg.errors import PlanError
    from memseg.models import build_model
    from memseg.nn.precision import parameter_dtype
    from memseg.planning import LOSS, parse_card

    if len({parse_card(card.card).kind for card in plan.cards}) > 1:
        raise PlanError("the cards of a plan must be all CUDA or all CPU; make a new one: memseg plan")
    with torch.device("meta"):
        dtype = parameter_dtype(recipe.train.precision)
        model = build_model(recipe.model.name, num_classes=num_classes, norm=recipe.model.norm, dtype=dtype)
    plan.check_model(
        recipe.model.name,
        [*model.segments, LOSS],
        parameter_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        num_classes=num_classes,
        image=recipe.data.image,
        batch=recipe.train.batch,
        accumulation=recipe.train.accumulation,
        norm=recipe.model.norm,
        precision=recipe.train.precision,
        optimizer=recipe.optimizer.kind,
    )


def _stored_plan(folder: Path, recipe: "Recipe", num_classes: int) -> "Plan":
    from memseg.planning import load_plan
    from memseg.training.checkpoint import PLAN_FILE

    plan = load_plan(folder / PLAN_FILE)
    _check_plan(plan, recipe, num_classes)
    return plan
