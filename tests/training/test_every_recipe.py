"""Every shipped recipe, on small pictures in the layout of its own data set: its network is built, trained and scored.

What a recipe says of sizes and folders is replaced; everything else is as it is shipped.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing
from memseg.levels import Recompute
from memseg.models import build_model
from memseg.resources import shipped_folder
from memseg.training.optimizer import make_optimizer
from memseg.training.recipe import load_recipe

NAMES = sorted(path.stem for path in shipped_folder("recipes").rglob("*.toml"))
LABELS = {"cityscapes": [7, 8, 26, 0], "camvid": [0, 3, 8, 11], "voc": [0, 15, 20, 255], "folder": [0, 1, 255]}
"""Label values that occur in each data set, and its value for unlabelled pixels."""
PLACES = {
    "cityscapes": ("leftImg8bit/{split}/city/{name}_leftImg8bit.png", "gtFine/{split}/city/{name}_gtFine_labelIds.png"),
    "camvid": ("images/{split}/{name}.png", "labels/{split}/{name}.png"),
    "folder": ("images/{split}/{name}.png", "labels/{split}/{name}.png"),
    "voc": ("VOCdevkit/VOC2012/JPEGImages/{name}.jpg", "VOCdevkit/VOC2012/{labels}/{name}.png"),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folders with two pictures of 128x256 in each split, by data set."""
    random = np.random.default_rng(0)
    found = {name: tmp_path_factory.mktemp(name) for name in PLACES}
    (found["folder"] / "classes.txt").write_text("road\nsky\n")
    lists = found["voc"] / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for dataset, places in PLACES.items():
        for split in ("train", "val", "aug"):
            names = [f"city_00000{index}_{split}" for index in range(2)]
            labels = "SegmentationClassAug" if split == "aug" else "SegmentationClass"
            if dataset == "voc":
                (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
            for name in names:
                values = random.choice(LABELS[dataset], (4, 8)).repeat(32, 0).repeat(32, 1)
                pictures = (random.integers(0, 256, (128, 256, 3)), values)
                for place, picture in zip(places, pictures, strict=True):
                    path = found[dataset] / place.format(split=split, name=name, labels=labels)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture.astype(np.uint8)).save(path)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_and_scores(name, roots):
    shipped = load_recipe(name)
    stride = build_model_on_meta(shipped.model.name).output_stride
    settings = [f"data.image={stride}x{2 * stride}", "train.batch=2", "model.encoder_weights=none"]
    if shipped.data.dataset == "streets":
        settings += ["data.streets.length=2", "data.streets.val_length=2"]
    else:
        settings.append(f"data.root={roots[shipped.data.dataset]}")
    if shipped.data.fit == "pad":
        settings.append("data.image=128x256")
    if shipped.data.region:
        settings.append("data.region=[4, 120, 0, 256]")
    recipe = load_recipe(name, settings)

    dataset = recipe.data.open_train()
    view = recipe.data.training_view(dataset, seed=0)
    samples = [view[0, index] for index in range(2)]
    images, target = (torch.stack([sample[part] for sample in samples]) for part in ("image", "target"))
    assert target.dtype == torch.uint8
    assert (target < len(dataset.classes.names)).any()

    torch.manual_seed(0)
    model = build_model(recipe.model.name, num_classes=len(dataset.classes.names), norm=recipe.model.norm)
    model.set_recompute(Recompute.UNITS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = make_optimizer(recipe, model, model.encoder)
    loss = model.objective(recipe.loss.aux_weight)(*model.train()(images), target)
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} <= moved
    if recipe.model.norm == "frozen":
        assert not {key for key in moved if "running" in key}

    result = evaluate(model, recipe.data.open_val(), framing=Framing.of(recipe.data))
    assert 0 <= result.miou <= 1
    assert 0 <= result.pixel_accuracy <= 1


def build_model_on_meta(name):
    with torch.device("meta"):
        return build_model(name)
