"""How many images a second a network labels, by the ways there are to run it, and what each does to its answers.

Times are compared within one run: all ways take turns, so that what else the machine does hits them alike, and ratios
are taken within a round. A way that answers otherwise than the plain network is no faster way, so every answer is held
against that of plain float32, and what lies outside the tolerance is marked.

What is timed is a forward from normalised images on the device to full-size logits.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from memseg.errors import InputError, UnknownNameError
from memseg.inference.fold import fold_norms
from memseg.inference.plain import plain_graph
from memseg.inference.quantize import quantize, why_not_quantized
from memseg.models import SegmentedModel
from memseg.nn.layout import channels_last

Run = Callable[[Tensor], Tensor]

EXACT_DIFFERENCE = 1e-3
"""Of ways in float32: the largest difference of a logit, over the largest logit."""
EXACT_CHANGED = 1e-3
"""Of ways in float32: share of the pixels whose class may change; those where two classes are as good as equal."""
REDUCED_CHANGED = 0.02
"""Of ways in fewer bits: share of the pixels whose class may change."""
_WARM_UPS = 2


@dataclass(frozen=True)
class Subject:
    """What ways are made of."""

    model: SegmentedModel
    plain: GraphModule
    images: Tensor
    samples: Sequence[Tensor]
    """Other pictures like these, for ranges to be seen on."""


@dataclass(frozen=True)
class Config:
    """A way to run a network."""

    description: str
    make: Callable[[Subject], Run]
    exact: bool = True
    """Whether it computes in float32, so that its answers must be the same but for rounding."""
    why_not: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device."""


def _lying_so(graph: GraphModule) -> Run:
    """Of a graph whose images and maps are channels-last."""
    moved = graph.to(memory_format=torch.channels_last)
    return lambda images: moved(channels_last(images))


def _half(subject: Subject) -> Run:
    run = _lying_so(fold_norms(subject.plain).to(torch.bfloat16))
    return lambda images: run(images.to(torch.bfloat16)).float()


def _in_8_bits(subject: Subject) -> Run:
    samples = [channels_last(images) for images in subject.samples]
    quantized = quantize(fold_norms(subject.plain, pool_first=False), samples)
    return lambda images: quantized(channels_last(images))


def _compiled(graph: GraphModule, images: Tensor, *, freezing: bool) -> Run:
    import torch._inductor.config as inductor

    compiled: Run = torch.compile(graph)
    with inductor.patch(freezing=freezing):
        compiled(images)
    return compiled


def _compiled_folded(subject: Subject) -> Run:
    graph = fold_norms(subject.plain).to(memory_format=torch.channels_last)
    compiled = _compiled(graph, channels_last(subject.images), freezing=True)
    return lambda images: compiled(channels_last(images))


EAGER = "eager"
CONFIGS = {
    EAGER: Config("torch's own layers, float32", lambda subject: subject.plain),
    "memseg": Config("the layers of memseg, as evaluation and prediction run them", lambda subject: subject.model),
    "channels-last": Config("eager, channels-last", lambda subject: _lying_so(copy.deepcopy(subject.plain))),
    "folded": Config("batch norms folded into convolutions and clamps", lambda subject: fold_norms(subject.plain)),
    "folded+channels-last": Config("folded, channels-last", lambda subject: _lying_so(fold_norms(subject.plain))),
    "bf16": Config("folded, channels-last, weights and maps in bfloat16", _half, exact=False),
    "int8": Config("folded, channels-last, convolutions in 8 bits", _in_8_bits, False, why_not_quantized),
    "compile": Config(
        "eager through torch.compile", lambda subject: _compiled(subject.plain, subject.images, freezing=False)
    ),
    "compile+folded+channels-last": Config(
        "folded, channels-last, torch.compile with frozen weights", _compiled_folded
    ),
}
"""In the order of the table."""


@dataclass
class InferRow:
    """What was found of one way."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    speedups: list[float] = field(default_factory=list)
    """Seconds of eager over its own, round by round."""
    prepare_s: float = 0.0
    """To make it: fold, quantize, compile."""
    max_difference: float = 0.0
    """Largest of the differences of a logit from eager's."""
    changed_share: float = 0.0
    """Of the pixels whose strongest class is another."""
    within_tolerance: bool = True
    error: str | None = None
    """Why it could not run; then the rest says nothing."""

    @property
    def median_s(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.speedups)


def check_configs(names: Sequence[str]) -> list[str]:
    """The names of ways, once each, `eager` first.

    Raises:
        UnknownNameError: there is no such way.
    """
    for name in names:
        if name not in CONFIGS:
            raise UnknownNameError("configuration", name, CONFIGS)
    return list(dict.fromkeys((EAGER, *names)))


@torch.no_grad()
def bench_inference(
    model: SegmentedModel,
    images: Tensor,
    samples: Sequence[Tensor],
    *,
    configs: Sequence[str] = tuple(CONFIGS),
    device: torch.device | str = "cpu",
    rounds: int = 10,
    reduced_tolerance: float = REDUCED_CHANGED,
    progress: Callable[[str], None] = lambda text: None,
) -> list[InferRow]:
    """Times and answers of a network's forward by several ways, which take turns.

    Args:
        model: In float32; moved to `device`.
        images: (N, 3, H, W), normalised.
        samples: Other such batches, on which 8-bit ranges are seen.
        configs: Names of CONFIGS; `eager` always runs.
        device: Where to run.
        rounds: How often each is timed.
        reduced_tolerance: Share of the pixels whose class may change in fewer bits.
        progress: Told what is being done.

    Returns:
        A row for each way, `eager` first.

    Raises:
        UnknownNameError: there is no such configuration.
        InputError: the network does not take images of this size, or cannot be exported.
    """
    device = torch.device(device)
    names = check_configs(configs)
    model.check_image((images.shape[2], images.shape[3]))
    model = model.to(device).eval()
    images = images.to(device)
    progress("exporting the plain network")
    subject = Subject(model, _export(model, images), images, [sample.to(device) for sample in samples])
    rows, runs = [InferRow(name) for name in names], dict[str, Run]()
    reference = subject.plain(images)
    for row in rows:
        progress(f"preparing {row.name}")
        _prepare(row, runs, subject, device, reference, reduced_tolerance)
    running = [row for row in rows if row.error is None]
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        for row in running[index % len(running) :] + running[: index % len(running)]:
            row.seconds.append(_seconds(runs[row.name], images, device))
        for row in running:
            row.speedups.append(running[0].seconds[-1] / row.seconds[-1])
    return rows


def _export(model: SegmentedModel, images: Tensor) -> GraphModule:
    try:
        return plain_graph(model, images)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{model.name} must be a network that torch.export can record, it is not: {reason}") from error


def _prepare(
    row: InferRow,
    runs: dict[str, Run],
    subject: Subject,
    device: torch.device,
    reference: Tensor,
    reduced_tolerance: float,
) -> None:
    """Make a way and judge its answer."""
    config = CONFIGS[row.name]
    row.error = config.why_not(device)
    if row.error is not None:
        return
    started = time.perf_counter()
    try:
        run = config.make(subject)
        for _ in range(_WARM_UPS):
            answer = run(subject.images)
    except Exception as error:  # A compiler that is missing or fails is the machine's, and the other ways still count.
        row.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return
    row.prepare_s = time.perf_counter() - started
    row.max_difference = (answer - reference).abs().max().item()
    row.changed_share = (answer.argmax(1) != reference.argmax(1)).float().mean().item()
    if config.exact:
        largest = EXACT_DIFFERENCE * max(1.0, reference.abs().max().item())
        row.within_tolerance = row.max_difference <= largest and row.changed_share <= EXACT_CHANGED
    else:
        row.within_tolerance = row.changed_share <= reduced_tolerance
    runs[row.name] = run


def _seconds(run: Run, images: Tensor, device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    run(images)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
