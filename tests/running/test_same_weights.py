"""However a run is placed and whatever it rebuilds, it learns the same weights."""

from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.training.checkpoint import load_run, load_trained
from processes import hand_written_plan, largest_difference, streets, train, weights


def test_training_changes_every_tensor_of_the_model(single_run):
    trained, fresh = load_trained(single_run), build_model("ladder-densenet-mini", num_classes=8).state_dict()
    assert trained.step == load_run(single_run)[0].schedule.steps
    assert all(not tensor.equal(fresh[name].to(tensor.dtype)) for name, tensor in trained.model.state_dict().items())


def test_two_cards_that_rebuild_learn_what_one_learns_that_does_not(single_run, split_run):
    assert largest_difference(single_run, split_run) < 1e-9


def test_three_cards_learn_what_one_learns(single_run, tmp_path):
    # Tensors that skip the middle card pass through it.
    plan = hand_written_plan(tmp_path / "plan.json", 3, recompute=Recompute.SEGMENT)
    run = train(tmp_path / "run", *streets(load_run(single_run)[0].schedule.steps), "--plan", plan)
    assert largest_difference(single_run, run) < 1e-9


def test_frozen_norms_stay_frozen_and_the_rest_learns_the_same_on_two_cards(tmp_path):
    runs = [
        train(
            tmp_path / f"run{cards}",
            *streets(4, norm=NormMode.FROZEN),
            "--plan",
            hand_written_plan(tmp_path / f"plan{cards}.json", cards, norm=NormMode.FROZEN, recompute=level),
        )
        for cards, level in ((1, Recompute.NONE), (2, Recompute.NORMS))
    ]
    assert largest_difference(*runs) < 1e-9
    statistics = {name: tensor for name, tensor in weights(runs[1]).items() if "running" in name}
    assert statistics
    assert all((tensor == name.endswith("var")).all() for name, tensor in statistics.items())
