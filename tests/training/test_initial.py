"""What a run begins with: all of another run's weights, or an error that tells all that differs."""

import pytest
import torch
import torch.distributed as dist

from memseg.errors import InputError, MemsegError, ProblemsError
from memseg.models import build_model
from memseg.training.checkpoint import checkpoint_folders, save_checkpoint, write_run
from memseg.training.initial import check_initial_weights, load_initial_weights
from memseg.training.optimizer import make_optimizer
from memseg.training.recipe import load_recipe

MODEL, CLASSES = "ladder-densenet-mini", 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with checkpoints of two steps, whose weights are all 1 and all 2; beside it their state dicts."""
    folder = tmp_path_factory.mktemp("initial") / "run"
    recipe = load_recipe("streets_demo")
    write_run(folder, recipe, recipe.data.open_train().classes)
    model = build_model(MODEL, num_classes=CLASSES)
    optimizer = make_optimizer(recipe, model, ())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for step in (1, 2):
            for tensor in model.state_dict().values():
                tensor.fill_(step)
            save_checkpoint(folder, step, model, optimizer, keep=2)
            torch.save(model.state_dict(), folder.parent / f"{step}.pth")
    finally:
        dist.destroy_process_group()
    return folder


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (lambda run: run, 2),
        (lambda run: checkpoint_folders(run)[0], 1),
        (lambda run: run.parent / "1.pth", 1),
    ],
    ids=["run", "checkpoint", "file"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_weight_and_statistic_is_taken(source, value, dtype, run):
    model = build_model(MODEL, num_classes=CLASSES, dtype=dtype)
    load_initial_weights(source(run), model)
    state = model.state_dict()
    assert any(name.endswith("running_var") for name in state)
    assert all((tensor == value).all() for tensor in state.values())
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {dtype}


@pytest.mark.parametrize("source", [lambda run: run, lambda run: run.parent / "2.pth"], ids=["run", "file"])
def test_other_classes_are_refused_with_both_numbers(source, run):
    with torch.device("meta"):
        model = build_model(MODEL, num_classes=19)
    with pytest.raises(ProblemsError) as caught:
        check_initial_weights(source(run), model)
    assert "it tells 8 classes apart, the data set has 19" in str(caught.value)
    assert len([problem for problem in caught.value.problems if "must have 19" in problem]) >= 2


def test_another_network_is_refused_with_all_kinds_of_differences(run):
    with torch.device("meta"):
        model = build_model("ladder-densenet121", num_classes=CLASSES)
    with pytest.raises(ProblemsError) as caught:
        check_initial_weights(run, model)
    told = str(caught.value)
    assert "must be of ladder-densenet121" in told
    assert "tensors are missing: " in told
    assert "more of another shape" in told
    assert len(caught.value.problems) < 10


def test_a_single_number_where_logits_belong_is_told_like_any_other_shape(run, tmp_path):
    state = torch.load(run.parent / "1.pth")
    torch.save(state | {"segments.logits.conv.bias": torch.tensor(1.0)}, tmp_path / "odd.pth")
    with pytest.raises(ProblemsError, match=r"segments\.logits\.conv\.bias: has a single number, must have 8"):
        check_initial_weights(tmp_path / "odd.pth", build_model(MODEL, num_classes=CLASSES))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path / "absent", "there is none at"),
        (lambda path: path, "holds no checkpoint yet"),
        (lambda path: _write(path / "notes.txt"), "must be a state dict of the network"),
    ],
    ids=["absent", "no run", "no weights"],
)
def test_what_holds_no_weights_is_named(make, told, tmp_path):
    path = make(tmp_path)
    with pytest.raises(MemsegError, match=told) as caught:
        check_initial_weights(path, build_model(MODEL, num_classes=CLASSES))
    assert isinstance(caught.value, InputError)
    assert str(path) in str(caught.value)


def _write(path):
    path.write_text("not weights")
    return path


def test_encoder_weights_beside_them_are_refused():
    overrides = ["model.encoder_weights=some.pth", "model.initial_weights=runs/some"]
    with pytest.raises(MemsegError, match=r"model\.initial_weights: fills the whole network, and .* leave one of them"):
        load_recipe("streets_demo", overrides)
