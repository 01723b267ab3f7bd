"""The paper's two placements on two cards, as memseg predicts them: python -m benchmarks.paper_splits [--json].

Kreso, Krapac and Segvic trained LadderDenseNet-121 on two cards of 8 GB and LadderDenseNet-169 on 12 GB and 8 GB, on
whole images of 2048x1024, two at a time: stem and dense blocks 1 and 2 on the first card, the rest on the second. Here
are the plain networks (recompute level none, batch norm) placed the same way, each card with the three figures of its
memory, and the last once more under PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. The paper's framework was another
one, so its bytes may differ; cards are of that time.
"""

import argparse
from functools import partial

import torch

from benchmarks.result import tell
from memseg.models import build_model
from memseg.planning import parse_cards
from memseg.profiling import segmented_job, trace_job
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.card_memory import card_memory
from memseg.units import GIB

FIRST_CARD = {"stem", "block1", "transition1", "block2"}
SPLITS = {"ladder-densenet121": "gtx1070,gtx1070", "ladder-densenet169": "titanx,gtx1070"}
IMAGE, BATCH = (1024, 2048), 2


def split_rows(model: str, names: str) -> list[dict[str, str | int | float]]:
    """A row for each card."""
    cards = parse_cards(names)
    build = partial(build_model, model)
    with torch.device("meta"):
        placement = {segment: int(segment not in FIRST_CARD) for segment in build().segments}
    make = partial(segmented_job, build, image=IMAGE, batch=BATCH)
    profile = trace_job(make, device="cuda", placement=placement, num_cards=len(cards))
    rows: list[dict[str, str | int | float]] = []
    for index, card in enumerate(cards):
        part = profile.on_card(index)
        memory = card_memory(part, card)
        expandable = card_memory(part, card, settings=AllocatorSettings(expandable_segments=True))
        rows.append(
            {
                "model": model,
                "card": f"{index + 1}: {card.name}",
                "allocated GiB": memory.peak_allocated_bytes / GIB,
                "reserved GiB": (memory.peak_reserved_bytes or 0) / GIB,
                "device total GiB": (memory.device_total_bytes or 0) / GIB,
                "with expandable segments": (expandable.device_total_bytes or 0) / GIB,
                "card has GiB": card.capacity_bytes / GIB,
            }
        )
    return rows


def main() -> None:
    """Print both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    tell([row for model, names in SPLITS.items() for row in split_rows(model, names)], as_json=arguments.json)


if __name__ == "__main__":
    main()
