"""Costs and cards in, a plan out. Imports no torch, so it answers in milliseconds to seconds on any machine."""

from memseg.planning.advice import Change, NothingFitsError, infeasible_json
from memseg.planning.capacity import Capacity, largest_plan, smallest_cards
from memseg.planning.cards import Card, known_cards, load_card, parse_card, parse_cards
from memseg.planning.costs import IMAGES, LOSS, TARGET, LevelCost, ModelCosts, SegmentCost, Work
from memseg.planning.memory import Category, Moment, Peak, Stage
from memseg.planning.outside import Process
from memseg.planning.plan import Alternative, CardPlan, PlacedSegment, Plan, load_plan, save_plan, unsplittable
from memseg.planning.planner import Settings, make_plan
from memseg.planning.strategies import Aim
from memseg.planning.workload import CostSource, Workload

__all__ = [
    "IMAGES",
    "LOSS",
    "TARGET",
    "Aim",
    "Alternative",
    "Capacity",
    "Card",
    "CardPlan",
    "Category",
    "Change",
    "CostSource",
    "LevelCost",
    "ModelCosts",
    "Moment",
    "NothingFitsError",
    "Peak",
    "PlacedSegment",
    "Plan",
    "Process",
    "SegmentCost",
    "Settings",
    "Stage",
    "Work",
    "Workload",
    "infeasible_json",
    "known_cards",
    "largest_plan",
    "load_card",
    "load_plan",
    "make_plan",
    "parse_card",
    "parse_cards",
    "save_plan",
    "smallest_cards",
    "unsplittable",
]
