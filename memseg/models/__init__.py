"""Networks as lists of segments."""

from memseg.models.densenet import load_encoder, load_encoder_file
from memseg.models.segmented import IMAGES, Segment, SegmentedModel, SegmentGraph
from memseg.models.zoo import ModelCard, build_model, describe, model_names

__all__ = [
    "IMAGES",
    "ModelCard",
    "Segment",
    "SegmentGraph",
    "SegmentedModel",
    "build_model",
    "describe",
    "load_encoder",
    "load_encoder_file",
    "model_names",
]
