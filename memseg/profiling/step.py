"""The profile of one whole training step on one card."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memseg.levels import Precision, Recompute
from memseg.models.objective import Objective, training_step
from memseg.models.segmented import SegmentedModel, SegmentGraph
from memseg.planning.costs import Work
from memseg.profiling.timeline import Category, LayerRow, Phase, Timeline, nearest_layer
from memseg.profiling.trace import StepTracer

LOSS = "loss"
"""The name of the objective among the layers."""

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def fused_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam in one kernel: two moments for each parameter, and no temporaries on either device."""
    return torch.optim.Adam(parameters, lr=5e-4, fused=True)


@dataclass(frozen=True)
class LayerProfile:
    """One line of the per-layer table."""

    row: LayerRow
    forward: Work
    backward: Work
    """Includes what is rebuilt."""


@dataclass(frozen=True)
class StepProfile:
    """What one training step allocates and computes."""

    model: str
    image: tuple[int, int]
    batch: int
    timeline: Timeline
    work: Mapping[tuple[Phase, str], Work]
    """By phase and layer."""
    names: tuple[str, ...]
    """All layers in order, "block1" before "block1.denselayer1"."""
    precision: Precision = Precision.FLOAT32

    def layers(self, depth: int = 1) -> list[LayerProfile]:
        """The per-layer table: segments and the loss at depth 1, the layers inside them at greater depths."""
        shown = [name for name in self.names if name.count(".") < depth]
        inner = {name.rpartition(".")[0] for name in shown}
        # A layer whose parts are shown too keeps its line only for what is its own.
        rows = self.timeline.layers(shown)
        forward, backward = (gather(self.work, phase, shown) for phase in (Phase.FORWARD, Phase.BACKWARD))
        profiles = [LayerProfile(row, forward[row.name], backward[row.name]) for row in rows]
        return [one for one in profiles if one.row.name not in inner or one.forward + one.backward != Work(0, 0)]


def gather(work: Mapping[tuple[Phase, str], Work], phase: Phase, names: Iterable[str]) -> dict[str, Work]:
    """Work of a phase for each name; a layer counts to the longest name that is it or holds it."""
    totals = dict.fromkeys(names, Work(0, 0))
    for (of, layer), amount in work.items():
        name = nearest_layer(layer, totals)
        if of is phase and name in totals:
            totals[name] += amount
    return totals


def profile_step(
    build: Callable[[], SegmentedModel],
    *,
    image: tuple[int, int],
    batch: int,
    recompute: Recompute | Mapping[str, Recompute] = Recompute.NONE,
    aux_weight: float = 0.3,
    optimizer: OptimizerFactory = fused_adam,
    precision: Precision = Precision.FLOAT32,
    device: str = "cpu",
) -> StepProfile:
    """Trace one training step in its steady state, on fake tensors: no memory is needed, and no GPU.

    Args:
        build: Makes the model; called where tensors are fake.
        image: (height, width) of the images.
        batch: Images in the batch.
        recompute: Of all segments, or of the named ones.
        aux_weight: Of the objective.
        optimizer: Makes the optimizer.
        precision: To compute in; `build` gives the parameters its `parameter_dtype`.
        device: "cpu" or "cuda": whose workspaces to count.

    Raises:
        InputError: the model cannot take images of that size.
        UnknownNameError: `recompute` names a segment that the model lacks.
    """
    with FakeTensorMode():
        model = build().train()
        model.check_image(image, batch=batch)
        model.set_recompute(recompute)
        objective = Objective(aux_weight)
        timeline, work = _trace(
            model, objective, optimizer, image=image, batch=batch, precision=precision, device=device
        )
        names = tuple(name for name, _ in [*named_layers(model), (LOSS, objective)])
        return StepProfile(model.name, image, batch, timeline, work, names, precision)


def named_layers(graph: SegmentGraph) -> list[tuple[str, nn.Module]]:
    """All modules below the segments, by the names that reports use: "block1", "block1.denselayer1", ..."""
    prefix = "segments."
    return [(name.removeprefix(prefix), module) for name, module in graph.named_modules() if name.startswith(prefix)]


def know_parameters(tracer: StepTracer, graph: SegmentGraph) -> None:
    """Tell a tracer of the parameters and buffers of a graph, each with its layer."""
    for name, module in named_layers(graph):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        tracer.know(own, Category.PARAMETER, name)


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Make an optimizer's state by a step with gradients of zero, and return its tensors.

    The step changes parameters and counts as one; whoever wants neither restores both.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]


def _trace(
    model: SegmentedModel,
    objective: Objective,
    make_optimizer: OptimizerFactory,
    *,
    image: tuple[int, int],
    batch: int,
    precision: Precision,
    device: str,
) -> tuple[Timeline, Mapping[tuple[Phase, str], Work]]:
    """The timeline is taken here, while what outlives the step is still alive."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters)
    images = torch.empty(batch, 3, *image, dtype=parameters[0].dtype).contiguous(memory_format=torch.channels_last)
    target = torch.empty(batch, *image, dtype=torch.uint8)
    tracer = StepTracer([*named_layers(model), (LOSS, objective)], device=device)
    know_parameters(tracer, model)
    tracer.know(create_optimizer_state(optimizer), Category.OPTIMIZER_STATE)
    tracer.know([images, target], Category.INPUT)
    with tracer.tracing():
        training_step(
            model,
            objective,
            optimizer,
            images,
            target,
            precision=precision,
            begin=lambda phase: tracer.begin(Phase(phase)),
        )
    for name, module in named_layers(model):
        own = [parameter.grad for parameter in module.parameters(recurse=False) if parameter.grad is not None]
        tracer.know(own, Category.GRADIENT, name)
    return tracer.timeline(), dict(tracer.work)
