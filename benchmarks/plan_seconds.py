"""How long planning takes, once costs are known: python -m benchmarks.plan_seconds [--json].

Ladder DenseNet-169 at 1024x2048. A first plan profiles what it needs, or reads it from the cache; the second, which is
timed, has its costs in memory and begins anew with all else. Every strategy is compared, as `memseg plan` does it. The
eight cards are all different, which is hardest: no order of them is like another.
"""

import argparse
import time

from benchmarks.result import Row, progress, tell
from memseg.cli.planning import PlanRequest
from memseg.levels import NormMode, Precision
from memseg.planning import make_plan, parse_cards

TWO = "gtx1070,titanx"
EIGHT = "gtx1070,titanx,rtx2060,rtx3060,rtx3090,v100,t4,a10"
CASES = ((TWO, 2, "batch"), (TWO, 2, "frozen"), (EIGHT, 8, "batch"), (EIGHT, 4, "frozen"))


def measure(cards: str, batch: int, norm: str) -> Row:
    """One row."""
    request = PlanRequest(
        model="ladder-densenet169",
        num_classes=19,
        image=(1024, 2048),
        batch=batch,
        norm=NormMode(norm),
        precision=Precision.FLOAT32,
        aux_weight=0.3,
        cards=parse_cards(cards),
    )
    workload = request.workload()
    make_plan(workload, request.cards)
    start = time.perf_counter()
    plan = make_plan(workload, request.cards)
    return {
        "name": f"{len(request.cards)} cards, batch {batch}, {norm} norm",
        "plan_seconds": time.perf_counter() - start,
        "strategy": plan.strategy.value,
        "also_fit": len(plan.alternatives),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = []
    with progress(len(CASES)) as begin:
        for case in CASES:
            begin(f"{case[0]}, {case[2]}")
            rows.append(measure(*case))
    tell(rows, as_json=args.json)


if __name__ == "__main__":
    main()
