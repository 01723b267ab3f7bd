"""A network that is not ours trains like one of ours: cut into segments, on one card or split, with its skips."""

import json
from pathlib import Path

from memseg.training.checkpoint import load_trained
from processes import largest_difference, memseg, streets, train

NETWORK = f"{Path(__file__).parents[1] / 'models' / 'networks.py'}:unet"


def test_a_u_net_is_planned_split_trained_and_evaluated(tmp_path):
    network = ["--set", f"model.name={NETWORK}"]
    runs = [
        train(tmp_path / strategy, *streets(4), *network, "--cards", "cpu:1GiB,cpu:1GiB", "--strategy", strategy)
        for strategy in ("single", "split", "replicate")
    ]
    plans = [json.loads((run / "plan.json").read_text()) for run in runs]
    assert [len(plan["cards"]) for plan in plans] == [1, 2, 2]
    # On the first card of the split a segment's own output lives on, for it has left.
    for card in (card for run in runs for card in json.loads((run / "result.json").read_text())["cards"]):
        assert abs(card["predicted_peak_bytes"] / card["measured_peak_bytes"] - 1) < 0.001
    assert load_trained(runs[0]).model.name == NETWORK
    for run in runs[1:]:
        assert largest_difference(runs[0], run) < 1e-9
    done = memseg("eval", runs[1], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4


def test_a_network_that_labels_images_is_not_trained_on_pixels(tmp_path):
    done = memseg(
        "train", *streets(2), "--set", "model.name=torchvision.models:resnet18", "--cards", "cpu:1GiB",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "must name a network that labels pixels" in done.stderr
    assert "Traceback" not in done.stderr
