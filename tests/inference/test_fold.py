"""Folding changes no answer, whatever stands before and behind a norm; 8-bit convolutions change few."""

import pytest
import torch
from small_networks import ARCHITECTURES, small_network

from memseg.inference.fold import fold_norms
from memseg.inference.plain import AVG_POOL, CONV, NORM, plain_graph
from memseg.inference.quantize import quantize, why_not_quantized

why_not = why_not_quantized(torch.device("cpu"))
needs_vnni = pytest.mark.skipif(why_not is not None, reason=str(why_not))


def targets(graph, target):
    return graph.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_folded_norms_are_gone_and_change_nothing(kind):
    model = small_network(kind, dtype=torch.float64)
    images = torch.randn(2, 3, 64, 128, dtype=torch.float64)
    plain = plain_graph(model, images)
    folded = fold_norms(plain)
    expected = model(images)
    assert targets(plain, NORM)
    assert not targets(folded, NORM)
    for graph in (plain, folded):
        error = (graph(images) - expected).abs().max() / expected.abs().max()
        assert error < 1e-10
    assert targets(plain, NORM), "the given graph has been changed"


@torch.no_grad()
def test_a_transitions_pooling_goes_before_its_convolution():
    model = small_network("ladder-densenet", dtype=torch.float64)
    graph = fold_norms(plain_graph(model, torch.randn(1, 3, 64, 64, dtype=torch.float64)))
    behind_pooling = [reader.target for pool in targets(graph, AVG_POOL) for reader in pool.users]
    assert behind_pooling.count(CONV) == 3


@torch.no_grad()
def test_a_norm_of_weight_nought_leaves_its_bias():
    layer = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Conv2d(2, 1, 1)).double().eval()
    layer[0].weight.zero_()
    layer[0].bias.copy_(torch.tensor([3.0, -3.0]))
    images = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    graph = torch.export.export(layer, (images,)).module(check_guards=False)
    for guard in graph.graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.graph.erase_node(guard)
    torch.testing.assert_close(fold_norms(graph)(images), layer(images))


@needs_vnni
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_eight_bits_change_an_answer_by_little(kind):
    model = small_network(kind)
    images = torch.randn(3, 3, 64, 128)
    folded = fold_norms(plain_graph(model, images[:1]), pool_first=False)
    quantized = quantize(folded, torch.split(images, 1))
    expected = folded(images[:1])
    found = quantized(images[:1].contiguous(memory_format=torch.channels_last))
    in_float = len(targets(quantized, CONV))
    assert in_float <= 2, "more than the stem and what pads what no ReLU left is in float32"
    assert len(targets(quantized, torch.ops.onednn.qconv2d_pointwise.default)) == len(targets(folded, CONV)) - in_float
    assert (found - expected).std() < 0.1 * expected.std()


@needs_vnni
@torch.no_grad()
def test_a_single_convolution_in_eight_bits_is_right_to_half_a_step():
    class Pair(torch.nn.Module):
        """A projection of what a ReLU left, whose channels differ a thousandfold."""

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(16, 4, 1)

        def forward(self, images):
            return self.conv(torch.relu(images))

    torch.manual_seed(0)
    module = Pair().eval()
    images = torch.randn(1, 16, 32, 32) * torch.logspace(-3, 0, 16).view(1, -1, 1, 1)
    graph = torch.export.export(module, (images,)).module(check_guards=False)
    for guard in graph.graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.graph.erase_node(guard)
    difference = quantize(graph, [images])(images) - module(images)
    # Codes and weights are half a step off at most: 1/510 of the largest number, 1/254 of the largest weight.
    largest = (module.conv.weight.abs().amax(1) * images.relu().amax((0, 2, 3)).sum()).max()
    assert difference.abs().max() < largest * (1 / 510 + 1 / 254)
