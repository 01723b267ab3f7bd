"""`memseg profile --plan`: what each card of a plan allocates, traced as the run would do it."""

from collections import Counter
from functools import partial
from pathlib import Path

from memseg.planning import LOSS, load_plan, parse_cards
from memseg.reports.profile import ProfileReport
from memseg.units import format_image


def profile_plan(path: Path) -> list[ProfileReport]:
    """One report for each card, in the order of the step.

    Raises:
        PlanError: no such file, or not a plan that can be carried out.
        UnknownNameError: a card or a model that is not known here.
    """
    from memseg.models import build_model
    from memseg.nn.precision import parameter_dtype
    from memseg.profiling import segmented_job, trace_job
    from memseg.profiling.card_memory import card_memory
    from memseg.profiling.jobs.stage import stage_job

    plan = load_plan(path)
    build = partial(
        build_model, plan.model, num_classes=plan.num_classes, norm=plan.norm, dtype=parameter_dtype(plan.precision)
    )
    levels = {one.name: one.recompute for card in plan.cards for one in card.segments if one.name != LOSS}
    stages = [[one.name for one in card.segments if one.name != LOSS] for card in plan.cards]
    reports = []
    for index, card_plan in enumerate(plan.cards):
        (card,) = parse_cards(card_plan.card)
        if plan.strategy == "single":
            make = partial(
                segmented_job,
                build,
                image=plan.image,
                batch=plan.batch,
                recompute=levels,
                precision=plan.precision,
            )
        else:
            make = partial(stage_job, build, stages, index, image=plan.image, batch=plan.batch, recompute=levels)
        found = trace_job(make, device=card.kind)
        here = {name: str(levels[name]) for name in stages[index]}
        settings = {
            "image": format_image(plan.image),
            "batch": plan.batch,
            "norm": str(plan.norm),
            "recompute": here if len(Counter(here.values())) > 1 else next(iter(here.values())),
            "card_number": f"{index + 1} of {len(plan.cards)}",
        }
        reports.append(ProfileReport(found, card, card_memory(found, card), settings, judge_fit=True))
    return reports
