"""A CPU card's capacity is a limit that the operating system enforces."""

from processes import hand_written_plan, memseg, python, streets


def test_a_limit_lets_through_what_is_below_it_and_refuses_what_is_above():
    done = python(
        """
import torch
from memseg.running import is_out_of_memory, limit_memory
limit_memory(torch.device("cpu"), 500 * 2**20)
print(torch.ones(100 * 2**20, dtype=torch.uint8).max().item())
try:
    torch.zeros(600 * 2**20, dtype=torch.uint8)
except RuntimeError as error:
    print(is_out_of_memory(error))
print(is_out_of_memory(RuntimeError("something else")))
print(torch.ones(300 * 2**20, dtype=torch.uint8).max().item())
"""
    )
    assert (done.returncode, done.stdout.split()) == (0, ["1", "True", "False", "1"]), done.stderr


def test_a_run_that_its_card_cannot_hold_ends_with_one_clear_line(tmp_path):
    # The model fits; the first maps of so large an image do not.
    plan = hand_written_plan(tmp_path / "plan.json", 1, capacity=200 * 2**20, image=(1024, 2048))
    image = ["--set", "data.image=1024x2048"]
    done = memseg("train", *streets(2), *image, "--plan", plan, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("memseg train: cpu:4GiB: the memory of this card ran out, 0.20 GiB; the plan predicted 0 B")


def test_a_plan_that_does_not_fit_is_run_only_by_force(tmp_path):
    plan = hand_written_plan(
        tmp_path / "plan.json", 1, capacity=200 * 2**20, image=(1024, 2048), predicted=3 * 2**30, feasible=False
    )
    line = ["train", *streets(2), "--set", "data.image=1024x2048", "--plan", plan, "--out", tmp_path / "run"]
    refused = memseg(*line)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines() == [
        "memseg train: the plan predicts 3.00 GiB on cpu:4GiB, which has 0.20 GiB; --force runs it anyway"
    ]
    assert not (tmp_path / "run").exists()
    forced = memseg(*line, "--force")
    assert (forced.returncode, forced.stdout) == (2, "")
    assert "Traceback" not in forced.stderr
    last = forced.stderr.splitlines()[-1]
    told = "memseg train: cpu:4GiB: the memory of this card ran out, 0.20 GiB; the plan predicted 3.00 GiB"
    assert last.startswith(told)
