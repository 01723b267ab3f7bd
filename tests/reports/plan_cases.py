"""Plans made by hand, one of each kind, for the tests of what shows them."""

from memseg.levels import NormMode, Precision, Recompute, Schedule, Strategy
from memseg.planning import Alternative, CardPlan, PlacedSegment, Plan
from memseg.units import GIB

MIB = 2**20
LADDER = [
    "stem", "block1", "skip1", "transition1", "block2", "skip2", "transition2", "block3", "skip3", "transition3",
    "block4a", "skip4", "transition4", "block4b", "context", "aux_logits", "blend4", "blend3", "blend2", "blend1",
    "logits", "loss",
]  # fmt: skip
LEVELS = list(Recompute)


def card(
    name, names, *, capacity=8 * GIB, needs=6 * GIB, outside=0, position=0, node=0, replica=0, stage=0, share=2,
    seconds=0.5, levels=LEVELS,
):  # fmt: skip
    """A card whose peak of `needs` bytes is mostly activations; segments take `levels` in turn."""
    sizes = {
        "parameter": needs // 32, "buffer": 640 * 1024, "optimizer_state": needs // 16, "input": 26 * MIB,
        "transfer": needs // 20 if stage else 0, "gradient": needs // 10, "temporary": needs // 5,
    }  # fmt: skip
    sizes["activation"] = needs - sum(sizes.values())
    return CardPlan(
        card=name, position=position, node=node, replica=replica, stage=stage, capacity_bytes=capacity,
        reserve_bytes=3 * GIB // 4, predicted_peak_bytes=needs, outside_bytes=outside,
        peak_moment=f"backward of {names[len(names) // 2]}", batch_share=share, by_category=sizes,
        segments=tuple(PlacedSegment(name=one, recompute=levels[i % len(levels)]) for i, one in enumerate(names)),
        compute_seconds=seconds,
    )  # fmt: skip


def other(strategy, cards, shares, starts, rate, fullest, *, micro_batches=1, schedule=None):
    return Alternative(
        strategy=strategy, cards=cards, shares=shares, stage_starts=starts, micro_batches=micro_batches,
        schedule=schedule, images_per_second=rate, step_seconds=2 / rate, fullest_share=fullest,
    )  # fmt: skip


ALTERNATIVES = (
    other(Strategy.SPLIT, ("gtx1070", "titanx"), (2, 2), ("stem", "block3"), 12.5, 0.715),
    other(
        Strategy.REPLICATE_SPLIT, ("v100",) * 4, (4,) * 4, ("stem", "transition2"), 9.0, 0.93,
        micro_batches=4, schedule=Schedule.ONE_F_ONE_B,
    ),
    other(Strategy.SINGLE, ("gtx1070",), (2,), ("stem",), 1.75, 0.999),
)  # fmt: skip


def plan(strategy, *cards, **changes):
    settings = {
        "torch": "2.14.1", "model": "ladder-densenet169", "parameter_bytes": 60 * MIB, "num_classes": 19,
        "image": (1024, 2048), "batch": cards[0].batch_share, "accumulation": 1, "norm": NormMode.BATCH,
        "precision": Precision.FLOAT32, "micro_batches": 1, "schedule": None, "step_seconds": 1.14,
        "images_per_second": 1.75, "transfer_seconds": 0.0, "alternatives": ALTERNATIVES,
    }  # fmt: skip
    return Plan(strategy=strategy, cards=cards, **settings | changes)


def single():
    return plan(Strategy.SINGLE, card("titanx", LADDER, capacity=12 * GIB, needs=11 * GIB, levels=LEVELS[:1] * 6))


def split():
    """Over two unequal cards, the second a CPU with something outside the allocator; in micro-batches."""
    return plan(
        Strategy.SPLIT,
        card("gtx1070", LADDER[:5], needs=7 * GIB, share=8),
        card("cpu:24GiB", LADDER[5:], capacity=24 * GIB, needs=9 * GIB, outside=GIB, stage=1, position=1, share=8),
        transfer_seconds=0.043,
        norm=NormMode.FROZEN,
        micro_batches=4,
        schedule=Schedule.ONE_F_ONE_B,
    )


def replicate():
    """Over a large and a small card, with shares to suit."""
    large = card("a100", LADDER, capacity=40 * GIB, needs=30 * GIB, share=6, levels=LEVELS[2:])
    small = card("gtx1070", LADDER, needs=7 * GIB, share=2, replica=1, position=1, levels=LEVELS[2:])
    return plan(Strategy.REPLICATE, large, small, batch=8, accumulation=2, transfer_seconds=0.1)


def replicate_split():
    """Two splits of two cards, each card of a pair on another node than its neighbour in the stages."""
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return plan(
        Strategy.REPLICATE_SPLIT,
        *(
            card(
                "v100" if stage else "t4", LADDER[12:] if stage else LADDER[:12], capacity=(16 + 16 * stage) * GIB,
                needs=(12 + 4 * stage) * GIB, node=replica, position=stage, replica=replica, stage=stage, share=4,
                levels=LEVELS[replica:],
            )
            for replica, stage in places
        ),
        batch=8,
        norm=NormMode.FROZEN,
    )  # fmt: skip


def infeasible():
    """Forced on a card that is too small by 0.75 GiB."""
    return plan(Strategy.SINGLE, card("gtx1070", LADDER, needs=8 * GIB, levels=LEVELS[3:]), feasible=False)


CASES = {
    "single": single, "split": split, "replicate": replicate, "replicate-split": replicate_split,
    "infeasible": infeasible,
}  # fmt: skip
