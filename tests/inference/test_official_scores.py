"""The scores are those of the data sets' own scripts, on the same predictions."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from memseg.data import IGNORE_INDEX, ClassList, SegmentationDataset, open_dataset
from memseg.data.cityscapes import LABEL_IDS
from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing
from memseg.training.metrics import ConfusionMatrix
from official import made_frame, official_scores

exactly = partial(pytest.approx, rel=1e-12, abs=0)


class Says(nn.Module):
    """A network that answers with the label maps it was given, one after the other."""

    output_stride = 1

    def __init__(self, answers, num_classes=19):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.zeros(1))
        self._answers = iter(answers)

    def coarse_outputs(self, images):
        answer = torch.from_numpy(next(self._answers).astype(np.int64))
        assert answer.shape == images.shape[2:]
        logits = torch.zeros(1, self.num_classes, *answer.shape, dtype=torch.bfloat16)
        return (logits.scatter_(1, answer[None, None], 1),)


class Some(SegmentationDataset):
    """Some images of a split."""

    def __init__(self, whole, indices):
        self.whole, self.indices = whole, list(indices)
        self.name, self.split, self.classes = whole.name, whole.split, whole.classes

    def __len__(self):
        return len(self.indices)

    def key(self, index):
        return self.whole.key(self.indices[index])

    def size(self, index):
        return self.whole.size(self.indices[index])

    def image(self, index):
        return self.whole.image(self.indices[index])

    def target(self, index):
        return self.whole.target(self.indices[index])

    def instances(self, index):
        return self.whole.instances(self.indices[index])


def noisy(target, seed, num_classes=19):
    """Blocks of wrong answers on what is true, and something for what is unlabelled."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, num_classes, (-(-target.shape[0] // 5), -(-target.shape[1] // 5)), dtype=np.uint8)
    noise = np.kron(blocks, np.ones((5, 5), np.uint8))[: target.shape[0], : target.shape[1]]
    wrong = np.kron(random.random(blocks.shape) < 0.3, np.ones((5, 5), bool))[: target.shape[0], : target.shape[1]]
    return np.where(wrong | (target == IGNORE_INDEX), noise, target)


def write_as_ids(answers, keys, folder):
    paths = [folder / f"{key}_pred.png" for key in keys]
    for path, answer in zip(paths, answers, strict=True):
        Image.fromarray(np.array(LABEL_IDS, np.uint8)[answer]).save(path)
    return paths


def assert_the_same(result, official):
    """Every figure of the script, to the last digits."""
    assert result.miou == exactly(official["averageScoreClasses"])
    assert result.miiou == exactly(official["averageScoreInstClasses"])
    assert result.category_miou == exactly(official["averageScoreCategories"])
    assert result.category_miiou == exactly(official["averageScoreInstCategories"])
    for ours, theirs in (
        (result.iou, "classScores"),
        (result.iiou, "classInstScores"),
        (result.category_iou, "categoryScores"),
        (result.category_iiou, "categoryInstScores"),
    ):
        known = {name: score for name, score in official[theirs].items() if not np.isnan(score)}
        assert {name: score for name, score in ours.items() if score is not None} == exactly(known)


def test_made_frames_score_as_cityscapes_own_script_says(tmp_path, monkeypatch):
    keys = [f"somewhere_000000_00000{number}" for number in range(4)]
    truths = [made_frame(tmp_path, "val", key, (64, 128), seed) for seed, key in enumerate(keys)]
    dataset = open_dataset("cityscapes", "val", root=tmp_path)
    answers = [noisy(dataset.target(index), index) for index in range(4)]
    result = evaluate(Says(answers), dataset)
    assert result.instance_images == 4
    assert len(result.iiou) == 8
    assert_the_same(result, official_scores(write_as_ids(answers, keys, tmp_path), truths, monkeypatch))


def test_classes_that_appear_nowhere_are_left_out_as_the_script_does(tmp_path, monkeypatch):
    truths = [made_frame(tmp_path, "val", "somewhere_000000_000000", (16, 16), 5)]
    dataset = open_dataset("cityscapes", "val", root=tmp_path)
    answers = [dataset.target(0) % 19]
    result = evaluate(Says(answers), dataset)
    assert None in result.iou.values()
    assert None in result.iiou.values()
    official = official_scores(write_as_ids(answers, [dataset.key(0)], tmp_path), truths, monkeypatch)
    assert_the_same(result, official)


def test_real_frames_score_as_cityscapes_own_script_says(shared_data, tmp_path, monkeypatch):
    root = shared_data / "cityscapes"
    whole = open_dataset("cityscapes", "train", root=root)
    some = Some(whole, [0, 3])
    answers = [noisy(some.target(index), index) for index in range(2)]
    result = evaluate(Says(answers), some)
    keys = [some.key(index) for index in range(2)]
    truths = [next((root / "gtFine/train").rglob(f"{key}_gtFine_labelIds.png")) for key in keys]
    assert_the_same(result, official_scores(write_as_ids(answers, keys, tmp_path), truths, monkeypatch))


def test_iiou_is_that_of_the_frames_with_a_map_of_instances(tmp_path, monkeypatch):
    keys = [f"somewhere_000000_00000{number}" for number in range(3)]
    truths = [made_frame(tmp_path, "val", key, (64, 128), seed, instances=seed != 1) for seed, key in enumerate(keys)]
    dataset = open_dataset("cityscapes", "val", root=tmp_path)
    answers = [noisy(dataset.target(index), index) for index in range(3)]
    result = evaluate(Says(answers), dataset)
    predictions = write_as_ids(answers, keys, tmp_path)
    official = official_scores(predictions[::2], truths[::2], monkeypatch)
    assert (result.images, result.instance_images) == (3, 2)
    assert result.miiou == exactly(official["averageScoreInstClasses"])
    assert result.category_miiou == exactly(official["averageScoreInstCategories"])
    assert result.miou != pytest.approx(official["averageScoreClasses"], rel=1e-6)


def test_without_maps_of_instances_there_is_no_iiou(tmp_path):
    made_frame(tmp_path, "val", "somewhere_000000_000000", (64, 64), 0, instances=False)
    dataset = open_dataset("cityscapes", "val", root=tmp_path)
    result = evaluate(Says([dataset.target(0) % 19]), dataset)
    assert (result.miiou, result.iiou, result.category_miiou, result.category_iiou) == (None, {}, None, {})
    assert result.instance_images == 0
    assert result.category_miou == 1


def test_an_instance_is_cut_off_where_the_region_ends(tmp_path):
    made_frame(tmp_path, "val", "somewhere_000000_000000", (64, 64), 0)
    dataset = open_dataset("cityscapes", "val", root=tmp_path)
    wrong_outside = (dataset.target(0) + 1) % 19
    wrong_outside[12:50] = dataset.target(0)[12:50] % 19
    framed = evaluate(Says([wrong_outside[12:50]]), dataset, framing=Framing(region=(12, 50, 0, 64)))
    assert (framed.miou, framed.miiou, framed.category_miiou) == (1, 1, 1)


class Photographs(SegmentationDataset):
    """Three label maps of 21 classes in the way of VOC: objects in a background, and a border that is void."""

    name, split = "photographs", "val"
    classes = ClassList(tuple(f"class {number}" for number in range(21)), ((0, 0, 0),) * 21)

    def __len__(self):
        return 3

    def key(self, index):
        return f"{index}"

    def size(self, index):
        return (40, 50)

    def image(self, index):
        return np.zeros((40, 50, 3), np.uint8)

    def target(self, index):
        target = np.zeros((40, 50), np.uint8)
        for number in range(7):
            target[5 * number : 5 * number + 5, 10:40] = 7 * index + number
            target[5 * number, 10:40] = 255
        return target


def test_voc_is_the_mean_over_its_21_classes_with_the_border_left_out():
    dataset = Photographs()
    answers = [noisy(dataset.target(index), index, num_classes=21) for index in range(3)]
    result = evaluate(Says(answers, num_classes=21), dataset)
    # VOC's definition, pixel by pixel: true positives over true positives, false positives and false negatives.
    pixels = [
        (true, found)
        for index, answer in enumerate(answers)
        for true, found in zip(dataset.target(index).ravel().tolist(), answer.ravel().tolist(), strict=True)
        if true != 255
    ]
    scores = []
    for number in range(21):
        both = sum(true == found == number for true, found in pixels)
        either = sum(number in (true, found) for true, found in pixels)
        scores.append(both / either)
    assert result.miou == exactly(sum(scores) / 21)
    assert list(result.iou.values()) == exactly(scores)
    assert (result.category_miou, result.miiou, result.instance_images) == (None, None, 0)


def test_scores_are_those_that_torchmetrics_defines():
    # JaccardIndex and Accuracy, micro: from one-hot vectors, not from a table of counts.
    random = torch.Generator().manual_seed(0)
    target, predicted = (torch.randint(0, 6, (3, 20, 30), generator=random) for _ in range(2))
    predicted = torch.where(torch.rand(3, 20, 30, generator=random) < 0.5, target, predicted)
    confusion = ConfusionMatrix(6)
    confusion.update(predicted, target)
    true, found = (nn.functional.one_hot(one, 6).bool().flatten(0, 2) for one in (target, predicted))
    iou = (true & found).sum(0) / (true | found).sum(0).double()
    assert torch.allclose(confusion.iou(), iou, rtol=1e-12, atol=0)
    assert confusion.pixel_accuracy() == exactly(float((true & found).any(1).double().mean()))
