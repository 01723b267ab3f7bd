"""memseg demo: the whole road once, small enough for a laptop: plan, profile, train, evaluate, look."""

import argparse
from pathlib import Path

from memseg.cli.console import add_command, print_columns, wide_console
from memseg.cli.evaluate import print_scores
from memseg.cli.planning import PlanRequest
from memseg.cli.train import plan_for, print_result, train
from memseg.errors import InputError
from memseg.levels import NormMode, Precision
from memseg.units import format_image

_MODEL = "ladder-densenet169"
_IMAGE = (1024, 2048)
_BATCH = 2
_CARDS = "gtx1070,titanx"
_CPU_CARDS = "cpu:640MiB,cpu:704MiB"
_PICTURES = 4


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "demo",
        run,
        summary="Plan a large model for two GPUs, then train a small one on two CPU cards and look at what it sees.",
        examples=["memseg demo", "memseg demo --out /tmp/memseg-demo"],
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: demo)")


def run(args: argparse.Namespace) -> int:
    """Carry out the demo; 0."""
    out: Path = args.out
    if (out / "run").exists():
        raise InputError(f"{out / 'run'} is there already; remove it, or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    print(f"1. Plan {_MODEL} at {_IMAGE[0]}x{_IMAGE[1]}, batch {_BATCH}, for {_CARDS}\n")
    _plan_and_profile(out)
    print(f"\n2. Train a small ladder on generated streets, split over {_CPU_CARDS}\n")
    run_folder = _train(out)
    print("\n3. Evaluate it on scenes it has not seen\n")
    pictures = _evaluate_and_draw(out, run_folder)
    print("\nWhere everything lies:")
    print_columns(
        [
            ("the plan for two GPUs", str(out / "plan.json")),
            ("its per-layer profile", f"{out / 'profile.html'}, {out / 'profile.csv'}, {out / 'profile.png'}"),
            ("the training run", str(run_folder)),
            ("what the model sees", str(pictures)),
        ]
    )
    return 0


def _plan_and_profile(out: Path) -> None:
    from memseg.models import build_model
    from memseg.planning import LOSS, parse_cards, save_plan
    from memseg.profiling import profile_step
    from memseg.profiling.card_memory import card_memory
    from memseg.reports.memory_curve import save_memory_curve
    from memseg.reports.page import save_profile_page
    from memseg.reports.plan import plan_table
    from memseg.reports.profile import ProfileReport, profile_csv
    from memseg.reports.profile_view import profile_view

    cards = parse_cards(_CARDS)
    request = PlanRequest(
        model=_MODEL,
        num_classes=19,
        image=_IMAGE,
        batch=_BATCH,
        norm=NormMode.BATCH,
        precision=Precision.FLOAT32,
        aux_weight=0.3,
        cards=cards,
    )
    plan = request.plan("split")
    save_plan(plan, out / "plan.json")
    console = wide_console()
    print("Split over both cards:\n")
    console.print(plan_table(plan))
    print("\nWhat memseg predicts to be fastest:\n")
    console.print(plan_table(request.plan()))
    print("\nOne step with the levels of the split, layer by layer:\n")
    levels = {
        segment.name: segment.recompute for card in plan.cards for segment in card.segments if segment.name != LOSS
    }
    profile = profile_step(
        lambda: build_model(_MODEL), image=_IMAGE, batch=_BATCH, recompute=levels, device=cards[0].kind
    )
    settings = {"image": format_image(_IMAGE), "batch": _BATCH, "norm": str(NormMode.BATCH), "recompute": levels}
    report = ProfileReport(profile, cards[-1], card_memory(profile, cards[-1]), settings)
    rows = report.rows()
    console.print(profile_view(report, rows))
    (out / "profile.csv").write_text(profile_csv(rows), encoding="utf-8")
    save_memory_curve(report, out / "profile.png")
    save_profile_page(report, out / "profile.html")


def _train(out: Path) -> Path:
    from memseg.training.recipe import load_recipe

    recipe = load_recipe("streets_demo")
    classes = recipe.data.open_train().classes
    plan = plan_for(recipe, len(classes.names), None, _CPU_CARDS, "split")
    folder = out / "run"
    print_result(train(folder, plan, recipe, classes), folder)
    return folder


def _evaluate_and_draw(out: Path, run_folder: Path) -> Path:
    from PIL import Image

    from memseg.inference.evaluate import evaluate
    from memseg.inference.predict import predict_images
    from memseg.training.checkpoint import load_trained

    trained = load_trained(run_folder)
    scenes = trained.recipe.data.open_val()
    result = evaluate(trained.model, scenes)
    print_scores(result, trained.step)
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    paths = [pictures / f"{scenes.key(index)}.png" for index in range(_PICTURES)]
    for index, path in enumerate(paths):
        Image.fromarray(scenes.image(index)).save(path)
    predict_images(trained.model, paths, pictures, trained.classes)
    return pictures
