"""The tables of a recipe: what each key is called, which values it takes, and what it means.

The docstring under a key is what docs/recipes.md says of it. All are strict: unknown keys are refused, nothing is
converted in silence, and no value changes later.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator

from memseg.data import CLASS_WEIGHT_SCHEMES, Fit, Region, SegmentationDataset, dataset_names, open_dataset
from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Precision
from memseg.models import model_names
from memseg.units import parse_image

if TYPE_CHECKING:
    from memseg.data.training_view import TrainingView


def _read_image_size(value: object) -> tuple[int, int]:
    """(height, width) from its text; pydantic wants a ValueError where ours would raise InputError."""
    try:
        return parse_image(value if isinstance(value, str) else repr(value))
    except InputError as error:
        raise ValueError(str(error)) from None


ImageSize = Annotated[
    tuple[int, int],
    BeforeValidator(_read_image_size),
    PlainSerializer(lambda size: f"{size[0]}x{size[1]}", return_type=str),
]
"""(height, width) in pixels, written HEIGHTxWIDTH."""

NO_WEIGHTS = "none"
"""Of `model.encoder_weights`: random ones, where a recipe that is extended gives others."""
UNWEIGHTED = "none"
"""Of `loss.class_weights`: every pixel counts alike."""

Text = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=0)]


class StrictModel(BaseModel):
    """A table of a recipe: unknown keys, wrong types and non-finite numbers are refused, and no value changes later."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Reference(StrictModel):
    """What others have published of a run, to hold one's own result against."""

    source: Text
    """Where it stands: paper and table."""
    split: Text = "val"
    """Split of the data set that was scored."""
    miou: float = Field(ge=0, le=100)
    """Mean intersection over union, in per cent."""
    pixel_accuracy: float | None = Field(None, ge=0, le=100)
    """Share of labelled pixels whose class was found, in per cent."""
    iiou: float | None = Field(None, ge=0, le=100)
    """Cityscapes' instance-weighted mean of the same, in per cent."""


class StreetsConfig(StrictModel):
    """Options of the generated data set `streets`."""

    length: int = Field(200, gt=0)
    """Scenes in the training split."""
    val_length: int = Field(40, gt=0)
    """Scenes in every other split."""
    seed: int = Field(0, ge=0)
    """Other seeds give other scenes."""


class DataConfig(StrictModel):
    """Which pictures are trained on, and how each becomes an input of one fixed size."""

    dataset: Text
    """Name of a data set: `ade20k`, `camvid`, `cityscapes`, `folder`, `streets` or `voc`."""
    root: Path | None = Field(None, validate_default=True)
    """Folder of the data set, relative to the current folder. `streets` is generated and has none."""
    train_split: Text = "train"
    """Split that is trained on; `train_aug` of `voc` adds the labels of SBD."""
    val_split: Text = "val"
    """Split that is scored, in training and by `memseg eval`."""
    image: ImageSize
    """Size that the network trains on, as "HEIGHTxWIDTH"; both sides a multiple of the network's output stride."""
    fit: Fit = Fit.PAD
    """What happens to a picture of another size: `pad` to the right and bottom, random `crop`, or `resize`."""
    region: Region | None = None
    """Rows and columns [top, bottom, left, right] cut from each picture before it is fitted."""
    flip: bool = True
    """Mirror every other picture, at random, in training."""
    scale: tuple[Factor, Factor] | None = None
    """Resize each picture by a random factor between these, such as [0.5, 2.0], in training; then crop and pad."""
    color_jitter: Decay = 0.0
    """Multiply brightness, contrast and saturation by random factors from 1 - this to 1 + this, in training."""
    cache: Path | None = None
    """Folder that keeps decoded pictures, as they are before anything random; it may be deleted at any time."""
    streets: StreetsConfig | None = None
    """Options of the data set `streets`, in a table [data.streets]."""

    @field_validator("dataset")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in dataset_names():
            raise ValueError(str(UnknownNameError("data set", name, dataset_names())))
        return name

    @field_validator("root")
    @classmethod
    def _is_where_needed(cls, root: Path | None, info: ValidationInfo) -> Path | None:
        dataset = info.data.get("dataset")
        if dataset == "streets" and root is not None:
            raise ValueError("the data set streets is generated and has no folder; leave root out")
        if dataset not in (None, "streets") and root is None:
            raise ValueError(f"the data set {dataset} needs the folder that holds it; give data.root")
        return root

    @field_validator("region")
    @classmethod
    def _encloses_pixels(cls, region: Region | None) -> Region | None:
        if region is not None:
            top, bottom, left, right = region
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(
                    "must be [top, bottom, left, right] in pixels with top < bottom and left < right, "
                    f"got {list(region)}; try [30, 900, 0, 2048]"
                )
        return region

    @field_validator("scale")
    @classmethod
    def _is_range(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and scale[0] > scale[1]:
            raise ValueError(f"must be [smallest, largest], got {list(scale)}; try {sorted(scale)}")
        return scale

    @field_validator("cache")
    @classmethod
    def _has_files(cls, cache: Path | None, info: ValidationInfo) -> Path | None:
        if cache is not None and info.data.get("dataset") == "streets":
            raise ValueError("the data set streets is generated and has no files to decode; leave cache out")
        return cache

    @field_validator("streets")
    @classmethod
    def _has_its_data_set(cls, streets: StreetsConfig | None, info: ValidationInfo) -> StreetsConfig | None:
        dataset = info.data.get("dataset", "streets")
        if streets is not None and dataset != "streets":
            raise ValueError(f"these are options of the data set streets, but dataset is {dataset}; leave them out")
        return streets

    def open_train(self) -> SegmentationDataset:
        """The split that is trained on; see `open`."""
        return self.open(self.train_split)

    def open_val(self) -> SegmentationDataset:
        """The split that is scored; see `open`."""
        return self.open(self.val_split)

    def open(self, split: str) -> SegmentationDataset:
        """One split of the data set by its name, checked.

        Raises:
            DataError: the folder is not what the layout of this data set promises.
        """
        if self.dataset != "streets":
            return open_dataset(self.dataset, split, root=self.root)
        streets = self.streets or StreetsConfig()
        length = streets.length if split == self.train_split else streets.val_length
        return open_dataset(self.dataset, split, size=self.image, length=length, seed=streets.seed)

    def training_view(
        self, dataset: SegmentationDataset, *, seed: int, parts: Iterable[str] = ("image", "target")
    ) -> "TrainingView":
        """What training reads of a split.

        Args:
            dataset: From `open_train`.
            seed: Of the random choices: `train.seed`.
            parts: What to read: {"image"}, {"target"} or both.

        Raises:
            InputError: a picture and these values do not go together, or the cache has no room.
        """
        # Not above: it loads torchvision, which takes a second that only training needs.
        from memseg.data.training_view import TrainingView

        return TrainingView(
            dataset,
            size=self.image,
            fit=self.fit,
            flip=self.flip,
            seed=seed,
            parts=parts,
            region=self.region,
            scale=self.scale,
            color_jitter=self.color_jitter,
            cache=self.cache,
        )


class ModelConfig(StrictModel):
    """Which network is trained. Its number of classes comes from the data set."""

    name: Text
    """Name of a network (`memseg models` lists them), or what makes one: package.module:function, file.py:function."""
    norm: NormMode = NormMode.BATCH
    """What batch norm normalises with: the `batch`, `frozen` statistics, or those of all replicas, `synced`."""
    encoder_weights: Text | None = None
    """The encoder begins with torchvision's weights of this name, as `IMAGENET1K_V1`, or a file; `none`: random."""
    initial_weights: Path | None = None
    """A run or checkpoint folder, or a state dict file, of the same network: what the run begins with, all at `lr`."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if ":" not in name and name not in model_names():
            raise ValueError(str(UnknownNameError("model", name, model_names())))
        return name

    @field_validator("encoder_weights")
    @classmethod
    def _may_be_taken_back(cls, weights: str | None) -> str | None:
        return None if weights == NO_WEIGHTS else weights

    @field_validator("initial_weights")
    @classmethod
    def _is_the_only_source(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is not None and info.data.get("encoder_weights") is not None:
            raise ValueError("fills the whole network, and model.encoder_weights is given too; leave one of them out")
        return path


class OptimizerConfig(StrictModel):
    """Adam, as the paper sets it, or another."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam` with L2 regularisation, as in the paper; `adamw`, whose decay passes by the gradient; or `sgd`."""
    lr: float = Field(5e-4, gt=0)
    """Learning rate of the first step, before a warm-up lowers it."""
    weight_decay: float = Field(1e-4, ge=0)
    """This factor times the weight is added to the gradient; of `adamw` it is, times `lr`, taken off the weight."""
    decay_norms: bool = True
    """Whether `weight_decay` is for the parameters of norms and for biases too."""
    pretrained_lr_factor: float = Field(0.2, gt=0)
    """The encoder learns at `lr` times this when `model.encoder_weights` is given; otherwise it is not used."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of `adam` and `adamw`: decay of the mean and of the mean square of gradients, per step."""
    eps: float = Field(1e-8, gt=0)
    """Of `adam` and `adamw`: addition to the denominator."""
    momentum: Decay = 0.9
    """Of `sgd`: decay of the sum of gradients, per step; 0 keeps no sum, which saves its memory."""
    nesterov: bool = False
    """Of `sgd`: look one step ahead along the sum of gradients."""

    @field_validator("nesterov")
    @classmethod
    def _has_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("Nesterov's look ahead is along the momentum; give optimizer.momentum = 0.9")
        return nesterov

    @property
    def kind(self) -> str:
        """What decides how much the optimizer keeps, as plans and profiles name it: SGD with momentum is "momentum"."""
        return "momentum" if self.name == "sgd" and self.momentum else self.name


class ScheduleConfig(StrictModel):
    """How long the run is, and how the learning rate falls along it."""

    epochs: int | None = Field(None, gt=0)
    """Passes over the training split. Give this or `steps`."""
    steps: int | None = Field(None, gt=0, validate_default=True)
    """Optimizer steps. Give this or `epochs`."""
    poly_power: float = Field(1.5, ge=0)
    """The learning rate falls as (1 - step / steps) to this power."""
    warmup_steps: int = Field(0, ge=0)
    """Over so many first steps the learning rate rises in a straight line to where the fall would have it."""

    @field_validator("steps")
    @classmethod
    def _is_the_only_length(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (steps is None) == (info.data["epochs"] is None):
            found = "neither" if steps is None else f"epochs {info.data['epochs']} and steps {steps}"
            raise ValueError(f"exactly one of schedule.epochs and schedule.steps must be given, got {found}")
        return steps


class LossConfig(StrictModel):
    """Cross-entropy of the main logits and of the auxiliary logits."""

    aux_weight: float = Field(0.3, ge=0, le=1)
    """Share of the auxiliary loss; the main loss gets the rest."""
    class_weights: str | tuple[float, ...] = "none"
    """What a pixel counts by its class: `none`, `median-frequency` or `enet` from the data, or a number per class."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over all classes."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _is_scheme_or_numbers(cls, value: object) -> str | tuple[float, ...]:
        schemes = [UNWEIGHTED, *CLASS_WEIGHT_SCHEMES]
        if isinstance(value, str) and value in schemes:
            return value
        if isinstance(value, list | tuple) and all(type(one) in (int, float) for one in value):
            numbers = tuple(float(one) for one in value)
            if min(numbers, default=-1) >= 0 and 0 < max(numbers) < math.inf:
                return numbers
        raise ValueError(
            f"must be {', '.join(schemes)} or a list of numbers, one for each class, none below 0, got {value!r}"
        )

    @field_validator("label_smoothing")
    @classmethod
    def _spreads_over_what_counts(cls, smoothing: float, info: ValidationInfo) -> float:
        weights = info.data.get("class_weights", ())
        if smoothing and not isinstance(weights, str) and 0 in weights:
            raise ValueError("spreads labels to all classes, but some loss.class_weights are 0; leave one of them out")
        return smoothing


class TrainConfig(StrictModel):
    """The loop: what a step takes, and what is written when."""

    batch: int = Field(2, gt=0)
    """Images per pass, over all cards."""
    accumulation: int = Field(1, gt=0)
    """Passes per optimizer step, whose gradients are added up; batch norm sees the batch of each pass."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides initial weights, the order of images, flips and crops."""
    workers: int = Field(2, ge=0)
    """Processes that decode images, per card; 0 decodes in the training process."""
    precision: Precision = Precision.FLOAT32
    """What a step computes in: float32 or float64; or bfloat16 or float16, by autocast, with weights in float32."""
    log_every: int = Field(1, gt=0)
    """Steps between two lines of metrics."""
    checkpoint_every: int = Field(500, gt=0)
    """Steps between two checkpoints; the end of the run always writes one."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many of the newest checkpoints stay, beside the one with the best mIoU in validation."""
    evaluate_every: int = Field(1, ge=0)
    """Epochs between two evaluations on the validation split; 0 for never."""
    early_stop: int = Field(0, ge=0)
    """The run ends after so many evaluations in a row without a better mIoU; 0 for never."""
    clip_norm: float | None = Field(None, gt=0)
    """Gradients are scaled down where their norm, over all parameters, is larger than this."""
    deterministic: bool = False
    """Use algorithms that give the same bits in every run on the same cards; torch warns where CUDA has none."""

    @field_validator("early_stop")
    @classmethod
    def _has_evaluations(cls, early_stop: int, info: ValidationInfo) -> int:
        if early_stop and info.data.get("evaluate_every") == 0:
            raise ValueError("counts evaluations, but train.evaluate_every is 0; give that too, or leave this out")
        return early_stop


class RunConfig(StrictModel):
    """Where the run happens; the command line may say otherwise."""

    cards: Text | None = None
    """Cards as on the command line, such as "cpu:8GiB,cpu:12GiB"; left out, the command line must name them."""
    strategy: Literal["auto", "single", "split", "replicate", "replicate-split"] = "auto"
    """On one card, `split` over cards, `replicate` with shares of the batch, both, or `auto`: the fastest predicted."""
