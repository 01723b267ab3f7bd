"""`memseg profile --plan`: what each card of a plan allocates, traced as the run would do it."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from memseg.errors import InputError
from memseg.planning import LOSS, load_plan, parse_card
from memseg.reports.profile import ProfileReport
from memseg.units import format_image


def profile_plan(path: Path) -> list[ProfileReport]:
    """One report for each card, in the order of the step.

    Raises:
        PlanError: no such file, or not a plan that can be carried out.
        InputError: a plan with several micro-batches.
        UnknownNameError: a card or a model that is not known here.
    """
    from memseg.models import SegmentedModel, build_model
    from memseg.nn.precision import parameter_dtype
    from memseg.profiling import named_optimizer, segmented_job, trace_job
    from memseg.profiling.card_memory import card_memory
    from memseg.profiling.imagined_group import imagine_replicas
    from memseg.profiling.jobs.data_parallel import DataParallel
    from memseg.profiling.jobs.stage import stage_job

    plan = load_plan(path)
    if plan.micro_batches > 1:
        raise InputError(
            f"a plan to be profiled must have one micro-batch, {path} has {plan.micro_batches}; what it predicts of "
            "each card is in it"
        )

    def build() -> SegmentedModel:
        dtype = parameter_dtype(plan.precision)
        model = build_model(plan.model, num_classes=plan.num_classes, norm=plan.trained_norm, dtype=dtype)
        imagine_replicas(model, plan.replicas)
        return model

    stages = [[name for name in stage if name != LOSS] for stage in plan.stages]
    buckets = DataParallel(plan.replicas, gradient_as_bucket_view=True) if plan.replicas > 1 else None
    reports = []
    for number, card_plan in enumerate(plan.cards, start=1):
        card = parse_card(card_plan.card)
        levels = {one.name: one.recompute for one in card_plan.segments if one.name != LOSS}
        step: dict[str, Any] = {
            "image": plan.image,
            "batch": card_plan.batch_share,
            "recompute": levels,
            "accumulation": plan.accumulation,
            "optimizer": named_optimizer(f"{plan.optimizer}-fused"),
        }
        make = (
            partial(stage_job, build, stages, card_plan.stage, **step)
            if plan.strategy.splits
            else partial(segmented_job, build, **step, precision=plan.precision)
        )
        found = trace_job(make, device=card.kind, data_parallel=buckets)
        here = {name: str(level) for name, level in levels.items()}
        settings = {
            "image": format_image(plan.image),
            "batch": card_plan.batch_share,
            "norm": str(plan.trained_norm),
            "optimizer": plan.optimizer,
            "recompute": here if len(Counter(here.values())) > 1 else next(iter(here.values())),
            "card_number": f"{number} of {len(plan.cards)}",
        }
        reports.append(ProfileReport(found, card, card_memory(found, card), settings, judge_fit=True))
    return reports
