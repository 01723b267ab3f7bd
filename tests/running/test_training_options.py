"""What a recipe may change about training holds on every strategy, and memory is predicted with it.

All runs are small ones in float64 over the same few pictures, of which different parts are unlabelled.
"""

import json

import pytest
from side_by_side import carry_out, prepare

from memseg.cli.main import main
from memseg.cli.train import plan_for
from memseg.levels import NormMode
from memseg.planning import save_plan
from memseg.training.checkpoint import BEST, RESULT_FILE, checkpoint_folders, load_trained
from memseg.training.log import read_metrics
from memseg.training.recipe import override_recipe
from processes import IMAGE, hand_written_plan, largest_difference, masked_recipe, weights, write_masked_streets

STEPS = 3
CLIP_NORM = 0.5
OPTIONS = [
    f"train.clip_norm={CLIP_NORM}",
    "loss.class_weights=[0.1, 1, 5, 0.01, 2, 0.5, 10, 3]",
    "loss.label_smoothing=0.1",
    "optimizer.name=sgd",
    "optimizer.lr=0.1",
    "optimizer.nesterov=true",
    "optimizer.decay_norms=false",
    "schedule.warmup_steps=2",
    "train.evaluate_every=0",
]
PLACES = {"one process": {"shares": (4,)}, "split": {"shares": (4,), "stages": 2}, "replicas": {"shares": (3, 1)}}
OPTIMIZERS = {"momentum": ["name=sgd"], "sgd": ["name=sgd", "momentum=0"]}
# Nothing changes, so no evaluation is better than the first one.
STANDSTILL = ["optimizer.lr=1e-300", "train.early_stop=2", "train.keep_checkpoints=1", "schedule.steps=30"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folder of each name."""
    folder = tmp_path_factory.mktemp("options")
    root = write_masked_streets(folder / "data", images=8)
    plain = masked_recipe(root, STEPS, batch=4)
    folders = {}

    def add(name, recipe, write_plan):
        folders[name] = prepare(folder / name, recipe, write_plan)

    for name, place in PLACES.items():
        recipe = override_recipe(plain, [*OPTIONS, "train.accumulation=2"])
        add(name, recipe, lambda path, place=place: hand_written_plan(path, accumulation=2, **place))
    for name, options in OPTIMIZERS.items():
        overrides = [*(f"optimizer.{option}" for option in options), "schedule.steps=2", "train.evaluate_every=0"]
        recipe = override_recipe(plain, overrides)
        add(name, recipe, lambda path, recipe=recipe: save_plan(plan_for(recipe, 8, None, "cpu:2GiB", "single"), path))
    for name in ("once", "again"):
        recipe = override_recipe(plain, ["train.deterministic=true", "train.precision=float32"])
        add(name, recipe, lambda path: hand_written_plan(path, shares=(4,), precision="float32"))
    recipe = override_recipe(plain, [*STANDSTILL, "model.norm=frozen"])
    add("standstill", recipe, lambda path: hand_written_plan(path, 2, shares=(4,), norm=NormMode.FROZEN))
    # The first run's weights, its running statistics too, at another size.
    settings = [f"model.initial_weights={folders['one process']}", "model.norm=frozen", "data.image=128x128"]
    recipe = override_recipe(plain, [*settings, "optimizer.lr=1e-300", "train.evaluate_every=0"])
    add("continued", recipe, lambda path: hand_written_plan(path, shares=(4,), norm=NormMode.FROZEN, image=(128, 128)))
    carry_out(folders.values(), folder)
    return folders


@pytest.mark.parametrize("name", ["split", "replicas"])
def test_clipped_and_weighted_steps_are_those_of_one_process(name, runs):
    assert largest_difference(runs[name], runs["one process"]) < 1e-9
    for one, other in zip(read_metrics(runs[name]), read_metrics(runs["one process"]), strict=True):
        for key in ("loss", "lr", "grad_norm"):
            assert one[key] == pytest.approx(other[key], abs=1e-9), key
        # So that something was clipped.
        assert other["grad_norm"] > CLIP_NORM


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_peak_is_predicted_for_the_optimizer(name, runs):
    assert json.loads((runs[name] / "plan.json").read_text())["optimizer"] == name
    (card,) = json.loads((runs[name] / RESULT_FILE).read_text())["cards"]
    assert card["predicted_peak_bytes"] == pytest.approx(card["measured_peak_bytes"], rel=0.001)


def test_momentum_takes_as_much_as_the_parameters_more(runs):
    results = [json.loads((runs[name] / RESULT_FILE).read_text()) for name in OPTIMIZERS]
    momentum, plain = (result["cards"][0]["measured_peak_bytes"] for result in results)
    parameters = json.loads((runs["sgd"] / "plan.json").read_text())["parameter_bytes"]
    assert momentum - plain == pytest.approx(parameters, rel=0.01)


def test_two_runs_give_the_same_bytes(runs):
    mine, theirs = (checkpoint_folders(runs[name])[-1] for name in ("once", "again"))
    names = sorted(path.name for path in mine.glob("*.distcp"))
    assert names
    for name in names:
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
    told = [[(one.get("loss"), one.get("miou")) for one in read_metrics(runs[name])] for name in ("once", "again")]
    assert told[0] == told[1]


def test_a_run_whose_evaluations_find_nothing_better_ends_on_all_cards_and_keeps_its_best(runs, capsys):
    run = runs["standstill"]
    result = json.loads((run / RESULT_FILE).read_text())
    scores = [(one["step"], one["miou"]) for one in read_metrics(run) if "miou" in one]
    # 8 images in batches of 4: an evaluation every 2 steps.
    assert [step for step, _ in scores] == [2, 4, 6]
    assert (result["steps"], result["stopped_early"]) == (6, True)
    assert result["best"] == {"step": 2, "miou": scores[0][1]}
    assert [path.name for path in checkpoint_folders(run)] == ["step-00000002", "step-00000006"]
    assert (load_trained(run).step, load_trained(run, BEST).step) == (6, 2)
    assert main(["train", "--resume", str(run)]) == 2
    assert "the run has ended after 6 steps, as 2 evaluations found nothing better" in capsys.readouterr().err


def test_a_run_begins_with_the_weights_and_statistics_of_another_at_another_size(runs):
    first, second = weights(runs["one process"]), weights(runs["continued"])
    assert load_trained(runs["continued"]).recipe.data.image != IMAGE
    for name in first:
        # A learning rate of next to nothing changes nothing.
        assert (first[name] - second[name]).abs().max() < 1e-12, name
