"""Every strategy learns what one process learns, to the last digits, whatever part of its pixels is unlabelled.

The runs go over images of which from nothing to all is unlabelled, so that shares, micro-batches and passes have
unequal numbers of labelled pixels, and some have none.
"""

from dataclasses import dataclass

import pytest
from side_by_side import carry_out, prepare

from memseg.levels import NormMode, Recompute, Schedule
from memseg.training.checkpoint import checkpoint_folders
from memseg.training.log import read_metrics
from processes import IMAGE, SMALLEST_IMAGE, hand_written_plan, largest_difference, masked_recipe, write_masked_streets

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A run that is placed somehow."""

    stages: int = 1
    shares: tuple[int, ...] = (4,)
    accumulation: int = 1
    norm: NormMode = NormMode.BATCH
    micro_batches: int = 1
    schedule: Schedule | None = None
    recompute: Recompute = Recompute.NONE
    order: tuple[tuple[int, int], ...] | None = None

    @property
    def image(self):
        """Norms of two values alone give ones, and gradients of nothing but rounding errors, which Adam enlarges."""
        return SMALLEST_IMAGE if sum(self.shares) > 2 else IMAGE

    @property
    def reference(self):
        """The same work in one process, nothing rebuilt."""
        return Case(shares=(sum(self.shares),), accumulation=self.accumulation, norm=self.norm)

    def __str__(self):
        parts = [f"{self.stages} stages", "+".join(map(str, self.shares)), f"{self.accumulation} passes", self.norm]
        parts += [f"{self.micro_batches} {self.schedule}"] if self.schedule else []
        parts += [self.recompute] if self.recompute is not Recompute.NONE else []
        return ", ".join([*parts, *(["permuted"] if self.order else [])])


SPLITS = [
    Case(stages=2, accumulation=1),
    Case(stages=2, accumulation=2, recompute=Recompute.UNITS),
    Case(stages=3, accumulation=1, recompute=Recompute.SEGMENT),
    Case(stages=3, accumulation=2),
    Case(stages=3, order=((0, 2), (0, 0), (0, 1))),
]
MICRO_BATCHES = [
    Case(stages=2, norm=NormMode.FROZEN, accumulation=accumulation, micro_batches=count, schedule=schedule)
    for schedule in Schedule
    for count in (2, 4)
    for accumulation in (1, 2)
]
REPLICAS = [
    Case(shares=shares, accumulation=accumulation, recompute=level)
    for shares, level in (((1, 1), Recompute.NONE), ((3, 1), Recompute.UNITS), ((2, 1, 1), Recompute.NORMS))
    for accumulation in (1, 2)
]
GRIDS = [
    Case(stages=2, shares=(2, 2), accumulation=1),
    Case(stages=2, shares=(2, 2), accumulation=2, order=((1, 0), (0, 1), (1, 1), (0, 0))),
    Case(stages=2, shares=(3, 1), accumulation=1, recompute=Recompute.UNITS),
    Case(stages=2, shares=(3, 1), accumulation=2),
    *(
        Case(stages=2, shares=(2, 2), norm=NormMode.FROZEN, accumulation=passes, micro_batches=2, schedule=schedule)
        for passes, schedule in ((1, Schedule.GPIPE), (2, Schedule.ONE_F_ONE_B))
    ),
]
CASES = [*SPLITS, *MICRO_BATCHES, *REPLICAS, *GRIDS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folder of each case."""
    folder = tmp_path_factory.mktemp("strategies")
    root = write_masked_streets(folder / "data")
    cases = list(dict.fromkeys([*(case.reference for case in CASES), *CASES]))
    folders = {case: prepared(folder / f"run{number}", root, case) for number, case in enumerate(cases)}
    carry_out(folders.values(), folder)
    return folders


def prepared(folder, root, case):
    recipe = masked_recipe(
        root, STEPS, batch=sum(case.shares), image=case.image, accumulation=case.accumulation, norm=case.norm
    )

    def write_plan(path):
        hand_written_plan(
            path,
            case.stages,
            image=case.image,
            shares=case.shares,
            recompute=case.recompute,
            order=case.order,
            accumulation=case.accumulation,
            norm=case.norm,
            micro_batches=case.micro_batches,
            schedule=case.schedule,
        )

    return prepare(folder, recipe, write_plan)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_running_statistics_are_those_of_one_process(case, runs):
    assert largest_difference(runs[case], runs[case.reference]) < 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_scores_are_those_of_one_process(case, runs):
    found, expected = read_metrics(runs[case]), read_metrics(runs[case.reference])
    # 16 images are 4 steps of one pass of 4, and more than one epoch of others.
    assert len([record for record in expected if "loss" in record]) == STEPS
    assert [record for record in expected if "miou" in record]
    for one, other in zip(found, expected, strict=True):
        names = one.keys() - {"step_seconds", "images_per_second"}
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-9)


def test_a_step_of_several_passes_is_not_one_of_the_first(runs):
    one, two = (Case(norm=NormMode.FROZEN, accumulation=passes) for passes in (1, 2))
    assert largest_difference(runs[one], runs[two]) > 1e-4


def test_replicas_write_each_tensor_once(runs):
    sizes = [
        sum(path.stat().st_size for path in checkpoint_folders(runs[case])[-1].iterdir())
        for case in (Case(), Case(shares=(3, 1), recompute=Recompute.UNITS))
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
