"""The tables of a recipe: what each key is called, which values it takes, and what it means.

The docstring under a key is what docs/recipes.md says of it. All are strict: unknown keys are refused, nothing is
converted in silence, and no value changes later.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator

from memseg.data import Fit, SegmentationDataset, dataset_names, open_dataset
from memseg.data.transforms import Region
from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Precision
from memseg.models import model_names
from memseg.units import parse_image


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

Text = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


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
    """Name of a data set: `cityscapes`, `camvid`, `folder` or `streets`."""
    root: Path | None = Field(None, validate_default=True)
    """Folder of the data set, relative to the current folder. `streets` is generated and has none."""
    image: ImageSize
    """Size that the network trains on, as "HEIGHTxWIDTH"; both sides a multiple of the network's output stride."""
    fit: Fit = Fit.PAD
    """What happens to a picture of another size: `pad` to the right and bottom, random `crop`, or `resize`."""
    region: Region | None = None
    """Rows and columns [top, bottom, left, right] cut from each picture before it is fitted."""
    flip: bool = True
    """Mirror every other picture, at random, in training."""
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

    @field_validator("streets")
    @classmethod
    def _has_its_data_set(cls, streets: StreetsConfig | None, info: ValidationInfo) -> StreetsConfig | None:
        dataset = info.data.get("dataset", "streets")
        if streets is not None and dataset != "streets":
            raise ValueError(f"these are options of the data set streets, but dataset is {dataset}; leave them out")
        return streets

    def open(self, split: str) -> SegmentationDataset:
        """One split of the data set, checked.

        Raises:
            DataError: the folder is not what the layout of this data set promises.
        """
        if self.dataset != "streets":
            return open_dataset(self.dataset, split, root=self.root)
        streets = self.streets or StreetsConfig()
        length = streets.length if split == "train" else streets.val_length
        return open_dataset(self.dataset, split, size=self.image, length=length, seed=streets.seed)


class ModelConfig(StrictModel):
    """Which network is trained. Its number of classes comes from the data set."""

    name: Text
    """Name of a network (`memseg models` lists them), or what makes one: package.module:function, file.py:function."""
    norm: NormMode = NormMode.BATCH
    """What batch norm normalises with: the `batch`, `frozen` statistics, or those of all replicas, `synced`."""
    encoder_weights: Path | None = None
    """File with the state dict of torchvision's DenseNet of the same depth, or of a network of others; else random."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if ":" not in name and name not in model_names():
            raise ValueError(str(UnknownNameError("model", name, model_names())))
        return name


class OptimizerConfig(StrictModel):
    """Adam, as the paper sets it."""

    lr: float = Field(5e-4, gt=0)
    """Learning rate of the first step."""
    weight_decay: float = Field(1e-4, ge=0)
    """Added to the gradient as this factor times the weight, as in Adam with L2 regularisation."""
    pretrained_lr_factor: float = Field(0.2, gt=0)
    """The encoder learns at `lr` times this when `model.encoder_weights` is given; otherwise it is not used."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay of the mean and of the mean square of gradients, per step."""
    eps: float = Field(1e-8, gt=0)
    """Adam's addition to the denominator."""


class ScheduleConfig(StrictModel):
    """How long the run is, and how the learning rate falls along it."""

    epochs: int | None = Field(None, gt=0)
    """Passes over the training split. Give this or `steps`."""
    steps: int | None = Field(None, gt=0, validate_default=True)
    """Optimizer steps. Give this or `epochs`."""
    poly_power: float = Field(1.5, ge=0)
    """The learning rate falls as (1 - step / steps) to this power."""

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
    """How many of the newest checkpoints stay."""
    evaluate_every: int = Field(1, ge=0)
    """Epochs between two evaluations on the validation split; 0 for never."""


class RunConfig(StrictModel):
    """Where the run happens; the command line may say otherwise."""

    cards: Text | None = None
    """Cards as on the command line, such as "cpu:8GiB,cpu:12GiB"; left out, the command line must name them."""
    strategy: Literal["auto", "single", "split", "replicate", "replicate-split"] = "auto"
    """On one card, `split` over cards, `replicate` with shares of the batch, both, or `auto`: the fastest predicted."""
