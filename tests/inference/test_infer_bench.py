"""What is timed answers as the plain network does, or is said not to."""

import pytest
import torch
from small_networks import small_network

from memseg.errors import UnknownNameError
from memseg.inference import infer_bench
from memseg.inference.infer_bench import Config, bench_inference, check_configs


@pytest.fixture(scope="module")
def model():
    return small_network("ladder-densenet")


def test_every_way_without_a_compiler_answers_as_eager(model):
    images = torch.split(torch.randn(3, 3, 64, 128), 1)
    names = ["memseg", "channels-last", "folded", "folded+channels-last", "bf16", "int8"]
    rows = bench_inference(model, images[0], images[1:], configs=names, rounds=2, reduced_tolerance=0.2)
    assert [row.name for row in rows] == ["eager", *names]
    for row in rows:
        if row.error is not None:
            assert row.name == "int8"  # A processor without the instructions says so, and the rest goes on.
            continue
        assert len(row.seconds) == len(row.speedups) == 2
        assert row.within_tolerance, row
    assert all(row.max_difference < 1e-3 for row in rows[:5])
    assert rows[5].max_difference > 1e-3, "bf16 did not run in bf16"


def test_a_way_that_answers_otherwise_or_fails_is_no_win(model, monkeypatch):
    monkeypatch.setitem(infer_bench.CONFIGS, "wrong", Config("", lambda subject: lambda x: -subject.plain(x)))
    monkeypatch.setitem(infer_bench.CONFIGS, "broken", Config("", lambda subject: 1 // 0))
    images = torch.randn(1, 3, 64, 64)
    eager, wrong, broken = bench_inference(model, images, [], configs=["wrong", "broken"], rounds=1)
    assert eager.within_tolerance
    assert not wrong.within_tolerance
    assert wrong.changed_share > 0.5
    assert broken.error == "ZeroDivisionError: integer division or modulo by zero"
    assert (len(wrong.seconds), len(broken.seconds)) == (1, 0)


def test_configs_are_named_once_with_eager_first():
    assert check_configs(["int8", "memseg", "int8"]) == ["eager", "int8", "memseg"]
    with pytest.raises(UnknownNameError, match="unknown configuration 'foldd'; did you mean folded"):
        check_configs(["foldd"])
