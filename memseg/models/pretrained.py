"""Pretrained weights for any network: the encoder of one of ours, or the whole of one of others."""

from pathlib import Path

from memseg.errors import InputError
from memseg.models.foreign import load_original_file, match_original
from memseg.models.segmented import SegmentedModel
from memseg.models.weights import LoadReport, check_encoder, find_weights, load_encoder, read_weights


def load_pretrained(model: SegmentedModel, weights: str) -> LoadReport:
    """Fill a network of ours as `load_encoder`, or one of others from a file with the state dict of the original.

    Raises:
        InputError, ProblemsError: as `check_pretrained`; nothing has been changed.
    """
    if model.origin is not None:
        return load_encoder(model, find_weights(model, weights))
    report = check_pretrained(model, weights)
    load_original_file(model, Path(weights))
    return report


def check_pretrained(model: SegmentedModel, weights: str, *, progress: bool = False) -> LoadReport:
    """What `load_pretrained` would do, without doing it, but for a download; the model may be on the meta device.

    Args:
        model: A network.
        weights: As of `find_weights`; for networks of others a file.
        progress: Whether torchvision shows how far a download is.

    Raises:
        InputError: there are no such weights, or they cannot be read.
        ProblemsError: they are of another network; all that differs.
    """
    if model.origin is not None:
        return check_encoder(model, find_weights(model, weights, progress=progress))
    path = Path(weights)
    if not path.is_file():
        raise InputError(f"weights of {model.name} must be a file with its state dict, there is no file {weights}")
    stored = read_weights(path, f"a state dict of {model.name}")
    _, unused = match_original(model, stored, where=str(path))
    return LoadReport(tuple(key for key in stored if key not in set(unused)), (), tuple(unused))
