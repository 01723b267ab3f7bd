"""Cityscapes' own evaluation script, and data in Cityscapes' layout to run it on."""

import importlib

import numpy as np
import pytest
from PIL import Image

from memseg.data.cityscapes import LABEL_IDS

_KINDS = (*LABEL_IDS, 0, 3, 9, 29)
"""Label ids of made frames: what is scored, and some of what is not; 29 has instances all the same."""
_SINGLE = (24, 25, 26, 27, 28, 29, 31, 32, 33)


def official_scores(predictions, truths, monkeypatch):
    """What the script of cityscapesscripts says of PNGs of label ids, and of their `*_gtFine_labelIds.png`.

    Its speed-up in Cython is not built by default; both ways count the same.
    """
    pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed")
    # NumPy 2.4 took away a name that the script still uses.
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    script = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    settings = {"quiet": True, "JSONOutput": False, "evalInstLevelScore": True, "evalPixelAccuracy": False}
    for name, value in settings.items():
        monkeypatch.setattr(script.args, name, value)
    return script.evaluateImgLists([str(path) for path in predictions], [str(path) for path in truths], script.args)


def made_frame(root, split, key, size, seed, *, instances=True):
    """A frame of blocks of labels in Cityscapes' layout; the path of its label ids.

    The picture's grey is the label id, so that a network may know it. Of what comes in single things some blocks are
    instances and some a group, and some instances lie in several blocks.
    """
    random = np.random.default_rng(seed)
    blocks = random.choice(_KINDS, (size[0] // 8, size[1] // 8))
    single = np.isin(blocks, _SINGLE) & (random.random(blocks.shape) < 0.8)
    owners = np.where(single, blocks * 1000 + random.integers(0, 4, blocks.shape), blocks)
    labels, owners = (np.kron(one, np.ones((8, 8), int)) for one in (blocks, owners))
    city = key.split("_")[0]
    folder = root / "gtFine" / split / city
    folder.mkdir(parents=True, exist_ok=True)
    picture = root / "leftImg8bit" / split / city / f"{key}_leftImg8bit.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(labels.astype(np.uint8)[..., None], 3, axis=2)).save(picture)
    if instances:
        Image.fromarray(owners.astype(np.uint16)).save(folder / f"{key}_gtFine_instanceIds.png")
    path = folder / f"{key}_gtFine_labelIds.png"
    Image.fromarray(labels.astype(np.uint8)).save(path)
    return path
