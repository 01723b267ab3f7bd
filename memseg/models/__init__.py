"""Networks as lists of segments."""

from memseg.models.factory import load_address
from memseg.models.foreign import load_original, load_original_file, original_name, segment_module
from memseg.models.pretrained import check_pretrained, load_pretrained
from memseg.models.segmented import IMAGES, Segment, SegmentedModel, SegmentGraph
from memseg.models.weights import LoadReport, check_encoder, find_weights, load_encoder
from memseg.models.zoo import ModelCard, build_model, describe, model_names

__all__ = [
    "IMAGES",
    "LoadReport",
    "ModelCard",
    "Segment",
    "SegmentGraph",
    "SegmentedModel",
    "build_model",
    "check_encoder",
    "check_pretrained",
    "describe",
    "find_weights",
    "load_address",
    "load_encoder",
    "load_original",
    "load_original_file",
    "load_pretrained",
    "model_names",
    "original_name",
    "segment_module",
]
