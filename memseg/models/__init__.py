"""Networks as lists of segments."""

from memseg.models.densenet import load_encoder, load_encoder_file
from memseg.models.factory import load_address
from memseg.models.foreign import load_original, load_original_file, original_name, segment_module
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
    "load_address",
    "load_encoder",
    "load_encoder_file",
    "load_original",
    "load_original_file",
    "model_names",
    "original_name",
    "segment_module",
]
