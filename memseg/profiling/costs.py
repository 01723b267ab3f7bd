"""What each segment of a model costs alone, at every recompute level: what the planner plans with.

Each segment is run by itself on fake tensors, between stand-ins for its neighbours: inputs that come from a leaf, so
that gradients arrive somewhere, and a root whose backward makes the output's gradient, so that both live exactly as
long as the segment's own graph lets them. Which inputs a segment keeps, and whether it keeps its output, is seen by
dropping every other reference to them.

Layers copy what lies in memory otherwise than they need it, so stand-ins are laid out as the neighbours do it: as in
the plain network for level `none`, as in the recomputing one for all others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memseg.levels import NormMode, Precision, Recompute
from memseg.models.objective import Objective
from memseg.models.segmented import IMAGES, SegmentedModel
from memseg.nn.precision import computing
from memseg.planning.costs import LOSS, TARGET, LevelCost, ModelCosts, SegmentCost, Work
from memseg.profiling.jobs.job import OptimizerFactory, fused_adam
from memseg.profiling.step import create_optimizer_state
from memseg.profiling.timeline import Category, Phase, Timeline
from memseg.profiling.trace import StepTracer


@dataclass(frozen=True)
class _Layout:
    """Shape and strides of a tensor between segments, and strides of its gradient."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    grad_stride: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool


def model_costs(
    build: Callable[[], SegmentedModel],
    *,
    image: tuple[int, int],
    batch: int,
    norm: NormMode = NormMode.BATCH,
    aux_weight: float = 0.3,
    optimizer: OptimizerFactory = fused_adam,
    precision: Precision = Precision.FLOAT32,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelCosts:
    """Costs of one training step of a model, on fake tensors.

    Args:
        build: Makes the model; called where tensors are fake.
        image: (height, width) of the images.
        batch: Images in the batch.
        norm: The mode that `build` gives its norms; recorded, not checked.
        aux_weight: Of the objective.
        optimizer: Makes the optimizer.
        precision: To compute in; `build` gives the parameters its `parameter_dtype`.
        device: "cpu" or "cuda": whose workspaces to count.
        progress: Called with how many segments are done, and of how many.

    Raises:
        InputError: the model cannot take images of that size.
    """
    with FakeTensorMode():
        model = build().train()
        model.check_image(image, batch=batch)
        dtype = next(model.parameters()).dtype
        images = torch.empty(batch, 3, *image, dtype=dtype).contiguous(memory_format=torch.channels_last)
        target = torch.empty(batch, *image, dtype=torch.uint8)
        objective = Objective(aux_weight)
        layouts = {plain: _layouts(model, objective, images, target, precision, plain=plain) for plain in (True, False)}
        parts: list[tuple[str, nn.Module, tuple[str, ...]]] = [
            *((name, module, model.reads[name]) for name, module in model.segments.items()),
            (LOSS, objective, (*model.outputs, TARGET)),
        ]
        segments = []
        for done, (name, module, reads) in enumerate(parts):
            progress(done, len(parts))
            segments.append(_segment_cost(name, module, reads, layouts, optimizer, precision, device))
        progress(len(parts), len(parts))
    return ModelCosts(
        model=model.name,
        num_classes=model.num_classes,
        image=image,
        batch=batch,
        norm=norm,
        precision=precision,
        image_bytes=images.nbytes,
        target_bytes=target.nbytes,
        segments=tuple(segments),
    )


def _layouts(
    model: SegmentedModel,
    objective: Objective,
    images: Tensor,
    target: Tensor,
    precision: Precision,
    *,
    plain: bool,
) -> dict[str, _Layout]:
    """How every tensor between segments lies in memory, in the plain or in the recomputing network."""
    model.set_recompute(Recompute.NONE if plain else Recompute.UNITS)
    made: dict[str, Tensor] = {}
    grad_strides: dict[str, tuple[int, ...]] = {}
    alive = {IMAGES: images}
    with computing(precision, "cpu"):
        for name, reads in model.reads.items():
            out = model.segments[name](*(alive[read] for read in reads))
            out.register_hook(lambda grad, name=name: grad_strides.__setitem__(name, tuple(grad.stride())))
            alive[name] = made[name] = out
        loss = objective(*(alive[name] for name in model.outputs), target)
    loss.backward()
    made |= {IMAGES: images, TARGET: target, LOSS: loss}
    return {
        name: _Layout(
            tuple(tensor.shape),
            tuple(tensor.stride()),
            grad_strides.get(name, tuple(tensor.stride())),
            tensor.dtype,
            tensor.requires_grad,
        )
        for name, tensor in made.items()
    }


def _segment_cost(
    name: str,
    module: nn.Module,
    reads: tuple[str, ...],
    layouts: dict[bool, dict[str, _Layout]],
    optimizer: OptimizerFactory,
    precision: Precision,
    device: str,
) -> SegmentCost:
    module.zero_grad(set_to_none=True)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    state = create_optimizer_state(optimizer(trainable)) if trainable else []
    levels = []
    for level in getattr(module, "levels", (Recompute.NONE,)):
        if hasattr(module, "recompute"):
            module.recompute = level  # type: ignore[assignment]
        around = layouts[level is Recompute.NONE]
        levels.append(_level_cost(level, module, [around[read] for read in reads], around[name], precision, device))
        module.zero_grad(set_to_none=True)
    out = layouts[True][name]
    return SegmentCost(
        name=name,
        reads=reads,
        output_bytes=_size_bytes(out),
        output_needs_grad=out.needs_grad,
        parameter_bytes=sum(parameter.nbytes for parameter in module.parameters()),
        buffer_bytes=sum(buffer.nbytes for buffer in module.buffers()),
        gradient_bytes=sum(parameter.nbytes for parameter in trainable),
        optimizer_bytes=sum(tensor.nbytes for tensor in state),
        levels=tuple(levels),
    )


def _level_cost(
    level: Recompute, module: nn.Module, reads: list[_Layout], out: _Layout, precision: Precision, device: str
) -> LevelCost:
    tracer = StepTracer(device=device)
    tracer.know([*module.parameters(), *module.buffers()], Category.PARAMETER)
    with tracer:
        leaves = [torch.empty((), dtype=layout.dtype, requires_grad=layout.needs_grad) for layout in reads]
        fixed = tracer.allocated_bytes
        inputs = [_StandIn.apply(leaf, layout) for leaf, layout in zip(leaves, reads, strict=True)]
        keys = [tracer.key(tensor) for tensor in inputs]
        before = tracer.allocated_bytes
        tracer.begin(Phase.FORWARD)
        tracer.reset_peak()
        with computing(precision, "cpu"):
            result = module(*inputs)
        forward_peak = tracer.peak_bytes - before
        out_key = tracer.key(result)
        root = _Root.apply(result, out)
        del inputs, result
        saves_inputs = tuple(tracer.is_alive(key) for key in keys)
        saves_output = tracer.is_alive(out_key)
        kept = tracer.allocated_bytes
        shared = sum(_size_bytes(layout) for layout, saved in zip(reads, saves_inputs, strict=True) if saved)
        saved_bytes = kept - fixed - shared - root.nbytes - saves_output * _size_bytes(out)
        tracer.begin(Phase.BACKWARD)
        tracer.reset_peak()
        root.backward()
        backward_peak = tracer.peak_bytes - kept - _size_bytes(out)
        held_peak = _peak_beside_gradient(tracer.timeline()) - kept
    work = tracer.take_work()
    return LevelCost(
        recompute=level,
        saved_bytes=saved_bytes,
        saves_inputs=saves_inputs,
        saves_output=saves_output,
        forward_peak_bytes=forward_peak,
        backward_peak_bytes=max(0, backward_peak),
        backward_peak_held_bytes=max(0, held_peak),
        forward=_total(work, Phase.FORWARD),
        backward=_total(work, Phase.BACKWARD),
    )


def _peak_beside_gradient(timeline: Timeline) -> int:
    """The most that is allocated during backward, without the gradient of the output.

    It is the second that backward makes: the first is that of the root, a scalar.
    """
    _, gradient, *_ = (one for one in timeline.allocations if one.phase is Phase.BACKWARD)
    rest = replace(timeline, allocations=tuple(one for one in timeline.allocations if one is not gradient))
    return max(rest.curve[timeline.backward_start :], default=0)


def _total(work: Mapping[tuple[Phase, str], Work], phase: Phase) -> Work:
    return Work.total(part for (of, _), part in work.items() if of is phase)


def _size_bytes(layout: _Layout) -> int:
    size = layout.dtype.itemsize
    for side in layout.shape:
        size *= side
    return size


class _StandIn(torch.autograd.Function):
    """An input of a segment: laid out as given, made of a leaf that is next to nothing."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, layout: _Layout) -> Tensor:
        return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Root(torch.autograd.Function):
    """A scalar whose backward makes the gradient of a segment's output, laid out as given."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        return torch.empty_strided(layout.shape, layout.grad_stride, dtype=layout.dtype), None
