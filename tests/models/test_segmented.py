"""A graph of segments, whole and cut into stages."""

import copy
import weakref

import pytest
import torch
from torch import nn

from memseg.errors import UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.models import Segment, SegmentGraph, build_model
from memseg.nn import NormReluConv


def chain(stages, tensors):
    """Run stages one after the other, `tensors` by name, each stage told only what it asks for."""
    for stage in stages:
        assert set(stage.inputs) <= set(tensors)
        tensors = dict(zip(stage.outputs, stage(*(tensors[name] for name in stage.inputs)), strict=True))
    return list(tensors.values())


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    return build_model("ladder-densenet-mini", num_classes=3).double().eval()


def test_cut_anywhere_the_two_stages_compute_what_the_whole_does(mini):
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    names = list(mini.segments)
    with torch.no_grad():
        expected = mini.coarse_outputs(images)
        for cut in range(1, len(names)):
            stages = [mini.stage(names[:cut]), mini.stage(names[cut:])]
            assert stages[0].outputs == stages[1].inputs
            for found, whole in zip(chain(stages, {"images": images}), expected, strict=True):
                assert torch.equal(found, whole), f"cut before {names[cut]}"


@pytest.mark.parametrize("norm", NormMode)
def test_gradients_cross_every_border(norm):
    whole = build_model("ladder-densenet-mini", num_classes=3, norm=norm).double().train()
    parts = copy.deepcopy(whole)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    sum(out.square().mean() for out in whole(images)).backward()
    outputs = chain([parts.stage([name]) for name in parts.segments], {"images": images})
    sum(out.square().mean() for out in outputs).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_stages_keep_the_names_and_share_the_parameters_of_the_whole(mini):
    names = list(mini.segments)
    stages = [mini.stage(names[:4]), mini.stage(names[4:9]), mini.stage(names[9:])]
    keys = [key for stage in stages for key in stage.state_dict()]
    assert keys == list(mini.state_dict())
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter is mini.get_parameter(name)


def test_a_stage_takes_and_gives_what_crosses_its_borders(mini):
    middle = mini.stage(["transition1", "block2", "skip2"])
    # block1 was read last by transition1; skip1 waits for blend1 and is passed through.
    assert middle.inputs == ("block1", "skip1")
    assert middle.outputs == ("skip1", "block2", "skip2")
    last = mini.stage(["logits"])
    # The auxiliary logits are an output of the model, so they travel to the end.
    assert (last.inputs, last.outputs) == (("aux_logits", "blend1"), ("logits", "aux_logits"))


@pytest.mark.parametrize("names", [[], ["stem", "skip1"], ["block2", "block1"], ["logits", "stem"], ["nothing"]])
def test_a_stage_is_a_run_of_consecutive_segments(mini, names):
    with pytest.raises(ValueError, match="are not consecutive segments"):
        mini.stage(names)


def test_a_tensor_is_freed_after_its_last_reader():
    made = {}

    class Make(nn.Module):
        """Notes which tensors are alive while it runs."""

        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, *inputs):
            alive_at[self.name] = {name for name, tensor in made.items() if tensor() is not None}
            out = torch.ones(1)
            made[self.name] = weakref.ref(out)
            return out

    alive_at = {}
    # a is read by b and c, b by c; d reads c alone, and a is not wanted any more.
    edges = {"a": ("images",), "b": ("a",), "c": ("a", "b"), "d": ("c",)}
    graph = SegmentGraph(
        [Segment(name, Make(name), reads) for name, reads in edges.items()], inputs=["images"], outputs=["d"]
    )
    graph.run(torch.ones(1))
    assert alive_at == {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"c"}}


def test_edges_that_lead_nowhere_are_refused():
    def graph(*edges, outputs=()):
        segments = [Segment(name, nn.Identity(), tuple(reads)) for name, *reads in edges]
        return SegmentGraph(segments, inputs=["images"], outputs=outputs)

    with pytest.raises(ValueError, match=r"segment b reads \['c'\], which nothing before it makes"):
        graph(("a", "images"), ("b", "c"), ("c", "a"))
    with pytest.raises(ValueError, match="segment a is made twice"):
        graph(("a", "images"), ("a", "images"))
    with pytest.raises(ValueError, match=r"outputs \['z'\] are not made"):
        graph(("a", "images"), outputs=["z"])


def test_levels_are_set_for_all_or_by_name(mini):
    model = copy.deepcopy(mini)
    model.set_recompute(Recompute.SEGMENT)
    # transition4 is a pooling: there is nothing to rebuild in it.
    assert {name for name, level in model.recompute_levels.items() if level is Recompute.NONE} == {"transition4"}
    model.set_recompute({"block1": Recompute.NORMS})
    assert model.recompute_levels["block1"] is Recompute.NORMS
    assert model.recompute_levels["block2"] is Recompute.SEGMENT
    with pytest.raises(UnknownNameError, match="unknown segment 'block5'; did you mean block"):
        model.set_recompute({"block5": Recompute.NONE})


def test_the_level_of_a_context_is_that_of_both_its_units(mini):
    context = copy.deepcopy(mini.segments["context"])
    context.recompute = Recompute.UNITS
    units = [unit for unit in context.children() if isinstance(unit, NormReluConv)]
    assert [unit.recompute for unit in units] == [Recompute.UNITS, Recompute.UNITS]
