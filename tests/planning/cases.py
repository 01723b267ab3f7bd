"""Hand-sized costs for the tests of planning: small models whose bytes can be added up in the head."""

import random
from dataclasses import replace

from memseg.levels import NormMode, Precision, Recompute
from memseg.planning import Card, LevelCost, ModelCosts, SegmentCost, Work
from memseg.planning.costs import Arrival, BackwardMemory, SharedGradient, Stretch

LEVELS = list(Recompute)


def level(
    recompute: Recompute = Recompute.NONE,
    *,
    saved: int = 0,
    inputs: tuple[bool, ...] = (True,),
    output: bool = False,
    forward: int = 0,
    backward: int = 0,
    then: tuple[Stretch, ...] = (),
    adding: int | None = None,
    shared: tuple[SharedGradient, ...] = (),
    kernels: int = 0,
    flops: int = 1,
    work: tuple[Work, Work] | None = None,
) -> LevelCost:
    """`then` follows `backward`; unless given, `adding` is the same as these, and `work` is of `flops`."""
    memory = BackwardMemory((Stretch(backward), *then))
    with_gradients = memory if adding is None else BackwardMemory((Stretch(adding),))
    done = work or (Work(flops, 0), Work(2 * flops, 0))
    return LevelCost(recompute, saved, inputs, output, forward, memory, with_gradients, *done, shared, kernels)


def segment(name: str, reads: tuple[str, ...], *levels: LevelCost, output: int = 0, **sizes: int) -> SegmentCost:
    plain = {"parameter_bytes": 0, "buffer_bytes": 0, "gradient_bytes": 0, "optimizer_bytes": 0}
    return SegmentCost(name, reads, output, name != "loss", levels=levels, **{**plain, **sizes})


def model(*segments: SegmentCost, images: int = 0, target: int = 0, batch: int = 2) -> ModelCosts:
    return ModelCosts("tiny", 19, (64, 128), batch, NormMode.BATCH, Precision.FLOAT32, images, target, segments)


def card(available: int, name: str = "toy", *, flops: float = 1.0, link: float = 1.0) -> Card:
    """Of `available` bytes beside a reserve of 5; one operation per second."""
    return Card(name, name, "cpu", available + 5, 5, flops, 1.0, link, 1.0, None, {})


def random_model(generator: random.Random, num_segments: int, num_levels: int, largest: int = 50) -> ModelCosts:
    """A directed acyclic graph of segments with arbitrary sizes; the last is the loss."""

    def size() -> int:
        return generator.randint(0, largest)

    def shared(places: list[int]) -> tuple[SharedGradient, ...]:
        some = generator.sample(places, generator.randint(0, len(places)))
        return (SharedGradient(tuple(sorted(some)), size()),) if some else ()

    def stretches(places: int) -> tuple[Stretch, ...]:
        def gone() -> tuple[int, ...]:
            return tuple(place for place in range(places) if generator.random() < 0.4)

        return tuple(
            Stretch(size() - largest // 4, gone(), generator.random() < 0.4, generator.random() < 0.4)
            for _ in range(generator.randint(1, 4))
        )

    def memory(trained: list[int], places: int) -> BackwardMemory:
        arrivals = (Arrival(place, stretch) for place in trained for stretch in stretches(places))
        return BackwardMemory(stretches(places), tuple(arrivals))

    segments = []
    for position in range(num_segments):
        last = position == num_segments - 1
        earlier = [s.name for s in segments]
        reads = generator.sample(earlier, min(len(earlier), generator.randint(1, 2))) if earlier else ["images"]
        reads += ["target"] if last else []
        with_grad = [
            place
            for place, read in enumerate(reads)
            if read in earlier and segments[earlier.index(read)].output_needs_grad
        ]
        levels = tuple(
            LevelCost(
                recompute=recompute,
                saved_bytes=size(),
                saves_inputs=tuple(generator.random() < 0.5 for _ in reads),
                saves_output=generator.random() < 0.3,
                forward_peak_bytes=size(),
                backward_memory=memory(with_grad, len(reads)),
                backward_memory_adding=memory(with_grad, len(reads)),
                forward=Work(generator.randint(1, 30), generator.randint(0, 30)),
                backward=Work(generator.randint(1, 60), 0),
                shared_gradients=shared(with_grad),
            )
            for recompute in LEVELS[: generator.randint(1, num_levels)]
        )
        made = segment(
            "loss" if last else f"s{position}", tuple(reads), *levels, output=size(), parameter_bytes=size(),
            buffer_bytes=size(), gradient_bytes=size(), optimizer_bytes=size(),
        )  # fmt: skip
        segments.append(replace(made, output_needs_grad=not last and generator.random() < 0.8))
    return model(*segments, images=size(), target=size(), batch=generator.choice([1, 2]))
