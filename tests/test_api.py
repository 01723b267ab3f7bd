"""`memseg.profile` and `memseg.profile_placed`, as a program calls them."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import memseg
from memseg.errors import InputError, UnknownNameError
from memseg.planning.cards import parse_cards
from memseg.profiling import Category, DataParallel, UntraceableError
from memseg.reports.profile import profile_object

IMAGES = torch.empty(2, 3, 32, 32, device="meta")


def network():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 1))


def profile(**settings):
    return memseg.profile(**{"model": network, "inputs": IMAGES} | settings)


def test_importing_the_package_loads_no_torch():
    code = "import sys, memseg; assert 'torch' not in sys.modules; memseg.profile; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'profil'"):
        memseg.profil  # noqa: B018


def test_the_report_has_the_peak_its_moment_its_layers_and_what_is_alive():
    found = profile()
    peak = found.timeline.peak_allocated_bytes
    assert found.memory.peak_allocated_bytes == peak == sum(one.size_bytes for one in found.alive)
    assert [row.name for row in found.rows()] == ["0", "1", "2", "3", "loss"]
    numbers = sum(one.nbytes for one in [*network().parameters(), *network().buffers()])
    assert sum(row.parameter_bytes for row in found.rows()) == numbers
    text = io.StringIO()
    Console(file=text, width=200).print(found)
    assert "network, float32 2x3x32x32, optimizer adam, loss mean, float32" in text.getvalue()
    assert found.peak_moment in text.getvalue()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "network, float32 2x3x32x32, optimizer adam, loss mean, float32"),
        ({"name": "mine"}, "mine, float32 2x3x32x32, optimizer adam, loss mean, float32"),
        ({"model": network()}, "Sequential, float32 2x3x32x32, optimizer adam, loss mean, float32"),
        ({"model": lambda: network()}, "Sequential, float32 2x3x32x32, optimizer adam, loss mean, float32"),
        (
            {"optimizer": None, "precision": "bfloat16"},
            "network, float32 2x3x32x32, optimizer none, loss mean, bfloat16",
        ),
        (
            {"optimizer": torch.optim.Adagrad, "loss": F.cross_entropy, "target": torch.zeros(2, 32, 32).long()},
            "network, float32 2x3x32x32, int64 2x32x32, optimizer Adagrad, loss cross_entropy, float32",
        ),
    ],
    ids=["defaults", "name", "module", "lambda", "no optimizer", "functions"],
)
def test_the_headline_says_what_was_profiled(settings, told):
    assert profile(**settings).headline() == told


def test_any_optimizer_will_do():
    adagrad = profile(optimizer=torch.optim.Adagrad)
    # One sum of squares for each parameter, there from the start, and a count.
    parameters = [*network().parameters()]
    state = sum(one.nbytes + 4 for one in parameters)
    assert adagrad.timeline.by_category()[Category.OPTIMIZER_STATE] == state


def test_a_card_is_a_name_a_file_or_a_card(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text((Path(__file__).parents[1] / "profiles" / "v100.toml").read_text())
    (card,) = parse_cards("v100")
    peaks = {profile(card=one).memory.peak_reserved_bytes for one in ("v100", str(path), card)}
    assert len(peaks) == 1


def test_a_cuda_card_has_reserved_memory_and_the_cpu_has_none():
    on_card, on_cpu = profile(card="v100"), profile()
    assert on_card.memory.peak_allocated_bytes <= on_card.memory.peak_reserved_bytes < on_card.memory.device_total_bytes
    assert on_cpu.memory.peak_reserved_bytes is None
    assert (on_card.judge_fit, on_cpu.judge_fit) == (True, False)


def test_a_real_step_has_the_figures_of_a_fake_one():
    assert profile(real=True).timeline.peak_allocated_bytes == profile().timeline.peak_allocated_bytes


def test_settings_of_the_step_are_counted():
    plain = profile(optimizer="sgd").timeline.peak_allocated_bytes
    assert profile(optimizer="momentum").timeline.peak_allocated_bytes > plain
    assert profile(optimizer="sgd", accumulation=2).timeline.peak_allocated_bytes >= plain
    assert profile(optimizer="sgd", keep_output=False).timeline.peak_allocated_bytes <= plain
    buckets = profile(optimizer="sgd", data_parallel=DataParallel(2)).timeline.by_category()[Category.COMMUNICATION]
    assert buckets == sum(parameter.nbytes for parameter in network().parameters())


def test_settings_of_the_allocator_are_followed():
    def reserved(text):
        return profile(card="v100", allocator=text).memory.peak_reserved_bytes

    assert reserved("expandable_segments:True") <= reserved("")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"optimizer": "adm"}, UnknownNameError, "unknown optimizer 'adm'; did you mean adam"),
        ({"loss": "crossentropy"}, UnknownNameError, "unknown loss 'crossentropy'; did you mean cross-entropy"),
        ({"card": "v10"}, UnknownNameError, "unknown card 'v10'; did you mean v100"),
        (
            {"card": "v100,t4"},
            InputError,
            "card must name one card, got 'v100,t4'; memseg.profile_placed takes several",
        ),
        ({"precision": "fp16"}, InputError, "fp16.*float16"),
        ({"accumulation": 0}, InputError, "at least 1, got 0"),
        ({"card": "v100", "allocator": "expandable:True"}, InputError, "expandable: unknown key"),
        ({"allocator": "expandable_segments:True"}, InputError, "allocator.*CUDA"),
        ({"model": 3}, InputError, "a function that makes one, got int"),
        ({"inputs": torch.empty(2, 4, 32, 32)}, InputError, "network does not run on float32 2x4x32x32: layer 0 fails"),
        ({"inputs": (IMAGES, IMAGES)}, InputError, "the model itself fails with TypeError"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_hold_is_refused_with_what_would_mend_it(settings, error, message):
    with pytest.raises(error, match=message):
        profile(**settings)


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, images):
        found = self.first(images)
        return found[found.sum(1) > -1e9]


def test_a_model_that_reads_values_is_profiled_on_real_tensors():
    with pytest.raises(UntraceableError, match="real=True"):
        memseg.profile(Picky, torch.ones(8, 4))
    assert memseg.profile(Picky, torch.ones(8, 4), real=True).timeline.peak_allocated_bytes > 0


@pytest.mark.parametrize("inputs", [IMAGES, torch.empty(2, 4, 32, 32, device="meta")], ids=["runs", "fails"])
@pytest.mark.parametrize("card", ["cpu", "v100"])
def test_a_profile_leaves_nothing_behind_even_when_it_fails(inputs, card):
    def state():
        return (
            dict(torch_module._global_forward_hooks),
            dict(torch_module._global_forward_pre_hooks),
            _get_current_dispatch_mode_stack(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
        )

    before, random = state(), torch.get_rng_state()
    try:
        profile(inputs=inputs, card=card, precision="bfloat16")
    except InputError:
        assert inputs is not IMAGES
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)


# Over several cards.


def placed(placement, cards="gtx1070,titanx", **settings):
    return memseg.profile_placed(network, IMAGES, placement=placement, cards=cards, **settings)


def test_each_card_has_a_report_and_together_they_hold_the_parameters():
    first, second = placed({"3": 1}, optimizer="sgd")
    assert [one.card.name for one in (first, second)] == ["gtx1070", "titanx"]
    assert [one.settings["card_number"] for one in (first, second)] == ["1 of 2", "2 of 2"]
    assert second.timeline.by_category()[Category.PARAMETER] == (16 * 5 + 5) * 4
    alone = profile(optimizer="sgd", card="gtx1070").timeline.by_category()[Category.PARAMETER]
    assert sum(one.timeline.by_category()[Category.PARAMETER] for one in (first, second)) == alone
    for one in (first, second):
        assert one.judge_fit
        assert sum(tensor.size_bytes for tensor in one.alive) == one.timeline.peak_allocated_bytes
        assert profile_object(one, one.rows())["card_number"] in ("1 of 2", "2 of 2")


def test_a_card_that_nothing_is_placed_on_is_empty():
    first, second = placed({"0": 0})
    assert second.timeline.peak_allocated_bytes == 0
    assert first.timeline.peak_allocated_bytes == profile(card="gtx1070").timeline.peak_allocated_bytes
    assert second.rows() == []
    Console(file=io.StringIO()).print(second)


@pytest.mark.parametrize(
    ("placement", "cards", "error", "message"),
    [
        ({"3": 2}, "gtx1070,titanx", InputError, "3 must be placed on one of 2 cards, 0 to 1, got 2"),
        ({"4": 1}, "gtx1070,titanx", UnknownNameError, "unknown layer '4'"),
        ({"3": 1}, "gtx1070,cpu", InputError, "cards must all be CUDA cards or all CPU cards, got gtx1070,cpu"),
        ({"3": 1}, "gtx1070,titany", UnknownNameError, "unknown card 'titany'; did you mean titanx"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(placement, cards, error, message):
    with pytest.raises(error, match=message):
        placed(placement, cards)
