"""A twin without memory has the shapes, types and ties of its original, which stays as it is."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memseg.errors import InputError
from memseg.profiling.jobs.fake import fake_batch, fake_module, fake_tensor, real_batch, real_module


def fake_twin(module):
    with FakeTensorMode():
        return fake_module(module)


class Tied(nn.Module):
    """Words in, words out, with the same vectors for both."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.logits = nn.Linear(4, 10, bias=False)
        self.logits.weight = self.embedding.weight

    def forward(self, words):
        return self.logits(self.embedding(words))


class Holder(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self, kind):
        super().__init__()
        tensor = torch.ones(4)
        self.held = {"plain": tensor, "list": [tensor, 3], "tuple": (tensor, "a"), "dict": {"scale": tensor}}[kind]


def leaves(held):
    values = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else [held]
    return [value for value in values if isinstance(value, torch.Tensor)]


def test_a_twin_has_names_shapes_strides_and_types_and_no_memory():
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3))).double()
    model.to(memory_format=torch.channels_last)
    twin = fake_twin(model)
    tensors, twins = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert list(twins) == list(tensors)
    for name, tensor in tensors.items():
        assert isinstance(twins[name], FakeTensor), name
        assert (twins[name].shape, twins[name].stride(), twins[name].dtype) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        ), name
        assert isinstance(twins[name], nn.Parameter) == isinstance(tensor, nn.Parameter), name


def test_what_is_frozen_stays_frozen():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    twin = fake_twin(model)
    assert (twin.weight.requires_grad, twin.bias.requires_grad) == (True, False)


@pytest.mark.parametrize("origin", ["real", "meta", "fake"])
def test_tied_parameters_stay_tied(origin):
    with {"real": torch.device("cpu"), "meta": torch.device("meta"), "fake": FakeTensorMode()}[origin]:
        model = Tied()
    twin = fake_twin(model)
    assert twin.logits.weight is twin.embedding.weight
    assert twin.logits.weight is not model.logits.weight
    assert len(list(twin.parameters())) == 1


@pytest.mark.parametrize("kind", ["plain", "list", "tuple", "dict"])
def test_tensors_that_modules_hold_as_attributes_are_replaced(kind):
    model = Holder(kind)
    held = fake_twin(model).held
    assert isinstance(held, type(model.held))
    (twin,) = leaves(held)
    assert isinstance(twin, FakeTensor)
    assert twin.shape == (4,)
    (original,) = leaves(model.held)
    assert not isinstance(original, FakeTensor)


def test_results_of_a_computation_that_a_module_holds_are_replaced_too():
    # copy.deepcopy alone refuses tensors with a graph.
    model = nn.Linear(4, 4)
    model.last = model(torch.ones(2, 4))
    twin = fake_twin(model)
    assert isinstance(twin.last, FakeTensor)
    assert twin.last.grad_fn is None


def test_gradients_stay_with_the_model_they_belong_to():
    model = nn.Linear(4, 4)
    model(torch.ones(2, 4)).sum().backward()
    assert fake_twin(model).weight.grad is None
    assert model.weight.grad is not None


def test_weight_and_spectral_norm_have_twins():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
    )
    with FakeTensorMode():
        out = fake_module(model)(fake_tensor(torch.ones(3, 4)))
    assert isinstance(out, FakeTensor)
    assert out.shape == (3, 2)


def test_a_lazy_module_is_refused_with_what_to_do():
    with pytest.raises(InputError, match=r"lazy modules have no shapes .* run one through the model first"):
        fake_twin(nn.Sequential(nn.LazyLinear(3)))


def test_a_module_that_cannot_be_copied_is_refused_with_what_to_do():
    class Locked(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a lock")

    with pytest.raises(InputError, match=r"Locked cannot be copied \(cannot pickle a lock\); give a function"):
        fake_twin(Locked(2, 2))


def test_a_fake_batch_keeps_its_structure_and_what_is_no_tensor():
    batch = {"images": torch.ones(2, 3), "masks": [torch.ones(2, dtype=torch.bool), None], "scale": (0.5, "bilinear")}
    with FakeTensorMode():
        twin = fake_batch(batch)
    assert isinstance(twin["images"], FakeTensor)
    assert (twin["masks"][0].dtype, twin["masks"][1], twin["scale"]) == (torch.bool, None, (0.5, "bilinear"))
    assert not isinstance(batch["images"], FakeTensor)


def test_a_batch_that_wants_gradients_still_does():
    with FakeTensorMode():
        assert fake_tensor(torch.ones(2, requires_grad=True)).requires_grad
        assert not fake_tensor(torch.ones(2)).requires_grad


def test_a_real_twin_has_the_values_and_trains_alone():
    model = nn.Linear(2, 2)
    weight = model.weight.detach().clone()
    twin = real_module(model)
    assert torch.equal(twin.weight, weight)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(model.weight, weight)


def test_a_real_twin_of_a_model_without_values_is_refused():
    with pytest.raises(InputError, match="needs a real model, got one on the meta device"):
        real_module(nn.Linear(2, 2, device="meta"))


def test_a_real_batch_has_zeros_where_there_were_no_values():
    images, words = real_batch((torch.empty(2, 3, device="meta"), torch.full((2,), 7)))
    assert images.tolist() == [[0.0] * 3] * 2
    assert words.tolist() == [7, 7]
