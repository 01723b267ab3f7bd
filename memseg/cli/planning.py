"""From what a user asks for to a Plan, for every command that needs one: profile the model, then plan."""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from memseg.cli.console import progress_bar
from memseg.errors import InputError
from memseg.levels import NormMode, Precision, Recompute, Strategy
from memseg.planning import Card, Change, ModelCosts, Plan, Process, Settings, Workload, make_plan
from memseg.planning.plan import unsplittable
from memseg.units import format_image

if TYPE_CHECKING:
    from memseg.models import SegmentedModel

AUTO = "auto"
"""A strategy: whichever is best."""
_PASSES = (2, 3, 4, 5, 6, 8, 12, 16)
"""Into how many the batch may be cut, of the changes that are tried."""
_STACK_BYTES = 2 * 2**20
"""Of a thread where the limit is infinite: glibc's, pthread_create(3), on x86-64."""
OPTIMIZERS = ("adam", "adamw", "sgd", "momentum")
"""By what they keep of each parameter: two sums, none, and SGD with momentum one. The first is the default."""
STRATEGIES = (AUTO, *(strategy.value for strategy in Strategy))


class PlanRequest:
    """What is to be trained, and on what.

    Args:
        model: Name in the zoo, or the address of a factory.
        num_classes: That it tells apart.
        image: (height, width).
        batch: Images of each pass, over all replicas.
        norm: What batch norm normalises with.
        precision: What a step computes in.
        aux_weight: Of the objective.
        cards: To train on, all of one kind.
        accumulation: Passes in each step.
        nodes: Machines, each with an equal part of the cards.
        levels: Of recomputing that may be chosen.
        loaders: Processes that read data for each card.
        optimizer: One of OPTIMIZERS.

    Raises:
        InputError: CUDA and CPU cards together.
    """

    def __init__(
        self,
        *,
        model: str,
        num_classes: int,
        image: tuple[int, int],
        batch: int,
        norm: NormMode,
        precision: Precision,
        aux_weight: float,
        cards: Sequence[Card],
        accumulation: int = 1,
        nodes: int = 1,
        levels: Collection[Recompute] = tuple(Recompute),
        loaders: int = 2,
        optimizer: str = OPTIMIZERS[0],
    ) -> None:
        kinds = sorted({card.kind for card in cards})
        if len(kinds) > 1:
            raise InputError(
                f"cards must all be CUDA cards or all CPU cards, got {', '.join(card.name for card in cards)}"
            )
        self.model, self.num_classes, self.image, self.batch = model, num_classes, image, batch
        self.norm, self.precision, self.aux_weight, self.accumulation = norm, precision, aux_weight, accumulation
        self.cards, self.nodes, self.levels, self.loaders = cards, nodes, levels, loaders
        self.optimizer = optimizer
        self._kind = kinds[0] if kinds else "cuda"
        self._told_cache = False

    def plan(self, strategy: str = AUTO, settings: Settings | None = None, *, force: bool = False) -> Plan:
        """The best plan, with progress on standard error.

        Args:
            strategy: One of STRATEGIES.
            settings: What else is decided.
            force: Give the closest one where nothing fits.

        Raises:
            InputError: a split is asked for of what cannot be split.
            NothingFitsError: none fits; with what would.
        """
        settings = self.settings(strategy, settings)
        return make_plan(self.workload(), self.cards, settings, changes=self._changes(), force=force)

    def settings(self, strategy: str = AUTO, settings: Settings | None = None) -> Settings:
        """With the strategy and the machines in them.

        Raises:
            InputError: a split is asked for of what cannot be split.
        """
        wanted = None if strategy == AUTO else Strategy(strategy)
        # Before any profiling.
        if wanted and wanted.splits and (reason := unsplittable(self.precision)):
            raise InputError(f"{reason}; take --strategy single or replicate")
        return replace(settings or Settings(), strategy=wanted, nodes=self.nodes)

    def workload(
        self,
        *,
        batch: int | None = None,
        norm: NormMode | None = None,
        precision: Precision | None = None,
        image: tuple[int, int] | None = None,
        accumulation: int | None = None,
        levels: Collection[Recompute] | None = None,
    ) -> Workload:
        """What is to be trained, with single things changed."""
        source = partial(
            self._costs, norm=norm or self.norm, precision=precision or self.precision, image=image or self.image
        )
        return Workload(
            source,
            batch or self.batch,
            accumulation or self.accumulation,
            levels or self.levels,
            _process(self.loaders) if self._kind == "cpu" else None,
        )

    def build(self) -> "SegmentedModel":
        """The model, without memory."""
        import torch

        from memseg.models import build_model

        with torch.device("meta"):
            return build_model(self.model, num_classes=self.num_classes, norm=self.norm)

    def _costs(
        self, images: int, replicas: int, *, norm: NormMode, precision: Precision, image: tuple[int, int]
    ) -> ModelCosts:
        from memseg.models import build_model
        from memseg.nn.precision import parameter_dtype
        from memseg.profiling import named_optimizer
        from memseg.profiling.cost_cache import cached_model_costs

        # As the trainer makes it.
        optimizer = f"{self.optimizer}-fused"
        dtype = parameter_dtype(precision)
        synced = NormMode.SYNCED if replicas > 1 and norm is NormMode.BATCH else norm
        with (
            progress_bar(f"profiling {images} x {format_image(image)}") as progress,
            _as_input_error(self.model, format_image(image)),
        ):
            costs = cached_model_costs(
                lambda: build_model(self.model, num_classes=self.num_classes, norm=synced, dtype=dtype),
                image=image,
                batch=images,
                norm=synced,
                aux_weight=self.aux_weight,
                optimizer=(optimizer, named_optimizer(optimizer)),
                precision=precision,
                device=self._kind,
                replicas=replicas,
                progress=progress,
                complain=self._tell_cache,
            )
        return replace(costs, norm=norm, optimizer=self.optimizer)

    def _tell_cache(self, problem: str) -> None:
        """Once is enough."""
        if not self._told_cache:
            print(problem, file=sys.stderr)
        self._told_cache = True

    def offers(self, kinds: Collection[str]) -> Iterator[Change]:
        """Other precisions, batches and accumulations, as `--offer` names them, around what is asked for."""
        if "precision" in kinds:
            for precision in Precision:
                if precision is not self.precision and precision is not Precision.FLOAT64:
                    yield self._change(f"precision {precision}", precision=precision)
        if "batch" in kinds:
            for batch in (self.batch // 2, self.batch * 2, self.batch * 4):
                if batch and batch != self.batch:
                    yield self._change(f"batch {batch}", batch=batch)
        if "accumulation" in kinds:
            yield from self._accumulations()

    def _changes(self) -> Iterator[Change]:
        """Single changes of the request, tried one after the other when nothing fits."""
        print("nothing fits; trying single changes", file=sys.stderr)
        if len(set(self.levels)) < len(Recompute):
            yield self._change("any recompute level", levels=tuple(Recompute))
        yield from self._accumulations()
        for batch in sorted({self.batch - 1, self.batch // 2} - {0}, reverse=True):
            yield self._change(f"batch {batch}", batch=batch)
        if self.norm is not NormMode.FROZEN:
            yield self._change("norm frozen", norm=NormMode.FROZEN)
        if not self.precision.is_half:
            yield self._change("precision bfloat16", precision=Precision.BFLOAT16)
        height, width = self.image
        sizes = [(max(64, height * part // 4 // 64 * 64), max(64, width * part // 4 // 64 * 64)) for part in (3, 2)]
        for image in dict.fromkeys(sizes):
            if image != self.image:
                yield self._change(f"image {format_image(image)}", image=image)

    def _accumulations(self) -> Iterator[Change]:
        """The same images in each step, in more passes."""
        for passes in _PASSES:
            if self.batch % passes == 0 and passes <= self.batch:
                batch, accumulation = self.batch // passes, self.accumulation * passes
                yield self._change(
                    f"batch {batch} with accumulation {accumulation}", batch=batch, accumulation=accumulation
                )

    def _change(self, description: str, **changed: object) -> Change:
        make: Callable[..., Workload] = self.workload
        return Change(description, partial(make, **changed))


@contextmanager
def _as_input_error(model: str, size: str) -> Iterator[None]:
    """Inside, what a network of others cannot run is the user's to mend."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if ":" not in model:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{model} must run on images of {size}, but fails: {reason}") from error


def _process(loaders: int) -> Process:
    """How `memseg train` starts a process on this machine, at most with so many threads."""
    import os
    import resource

    from memseg.running.launch import environment

    settings = {**environment(), **os.environ}
    numbers = {}
    for name in ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_"):
        # OpenMP takes a list, of a number for each level of nesting.
        first = settings[name].partition(",")[0]
        if not first.strip().isdecimal():
            raise InputError(f"{name} must begin with a whole number, got {settings[name]!r} in the environment")
        numbers[name] = int(first)
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return Process(
        threads=numbers["OMP_NUM_THREADS"],
        stack_bytes=_STACK_BYTES if stack == resource.RLIM_INFINITY else stack,
        mmap_threshold_bytes=numbers["MALLOC_MMAP_THRESHOLD_"],
        loader_threads=loaders,
    )


def add_cards_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--cards and --strategy."""
    parser.add_argument(
        "--cards",
        metavar="LIST",
        required=required,
        help='cards by name, with commas: "gtx1070,titanx", "2*gtx1070", "cpu:8GiB,cpu:12GiB", "here" for those of '
        "this machine; memseg cards lists them",
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default=None, help="force a strategy (default: the best)")
