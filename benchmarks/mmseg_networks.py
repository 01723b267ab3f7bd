"""Networks of MMSegmentation as its version 0.x trained them, to be traced.

MMSegmentation 1.2.2 still ships every configuration of 0.x, under another file name, and builds it without compiled
operators once a stand-in for `mmcv._ext` is in place. What 0.x logged is more than forward and backward: each head
upsamples its logits, computes the loss, and then the accuracy of the same logits.

Needs mmsegmentation==1.2.2, mmengine, mmcv-lite==2.1.0, ftfy and regex; none is a dependency of memseg. Where pixels or
classes are selected by value (hard example mining, binary cross-entropy, Dice), all are taken: the most that it can be.
"""

import importlib.machinery
import re
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from benchmarks.old_torch import replace_sync_batch_norm


def install_mmcv_stand_in() -> None:
    """Let MMSegmentation be imported with mmcv-lite: its compiled operators exist by name and refuse to run.

    An operator that would have run on the GPU is unknown to a trace, and must not be left out in silence. Those that
    only fill tensors which they are given have nothing left to do.
    """
    if "mmcv._ext" in sys.modules:
        return

    class _Absent(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def run(*_: Any, **__: Any) -> None:
                if name not in _FILL_WHAT_THEY_GET:
                    raise NotImplementedError(f"mmcv's compiled operator {name!r} is not in mmcv-lite")

            return run

    module = _Absent("mmcv._ext")
    module.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", loader=None)
    sys.modules["mmcv._ext"] = module


_FILL_WHAT_THEY_GET = {"psamask_forward", "psamask_backward"}


_OF_A_RUN = re.compile(r"\d+xb\d+|[48]x\d{1,2}|lr\d.*|b8|b16|\d")
"""Words of a name that tell how a network was trained: processes by images, learning rate, images in all."""
_SAME_WORD = {"m": "mobilenet", "v3s": "v3-s", "fp16": "amp", "pretrain": "pre", "large": "l"}
_OFTEN_LEFT_OUT = {"resnest", "vit", "l", "fcn"}


def config_path(name: str, batch_per_gpu: int, configs: Path | None = None) -> Path:
    """The file of MMSegmentation 1.2.2 that holds a configuration of 0.x.

    Args:
        name: Of 0.x, without its suffix, for example "fcn_r50-d8_512x1024_40k_cityscapes".
        batch_per_gpu: Images on each GPU: new names tell it.
        configs: The folder of configurations; that of the installed package where none is given.

    Raises:
        LookupError: no file, or more than one, has the same words in its name.

    Names consist of the same words in another order, so words are compared.
    """
    root = configs or _installed_configs()
    wanted = _words(name)
    found: dict[int, list[Path]] = {}
    for path in sorted(root.glob("*/*.py")):
        different = wanted ^ _words(path.stem)
        if different <= _OFTEN_LEFT_OUT and re.search(rf"_\d+xb{batch_per_gpu}[-_]", path.stem):
            found.setdefault(len(different), []).append(path)
    closest = found[min(found)] if found else []
    # Files whose names have the same words differ in the number of processes, which does not matter here.
    if len({frozenset(_words(path.stem)) for path in closest}) != 1:
        raise LookupError(f"{name} with {batch_per_gpu} images: {len(closest)} files have that name in {root}")
    return closest[0]


def _words(name: str) -> set[str]:
    # One file of 1.2.2 lacks a hyphen: resnest_s101-d8_pspnet_4xb2-80k_cityscapes512x1024.py.
    words = (_SAME_WORD.get(word, word) for word in re.split(r"[_-]|(?<=cityscapes)(?=\d)", name))
    return {part for word in words for part in word.split("-") if not _OF_A_RUN.fullmatch(part)} - {""}


def _installed_configs() -> Path:
    install_mmcv_stand_in()
    import mmseg

    return Path(mmseg.__file__).parent / ".mim" / "configs"


@dataclass(frozen=True)
class LoggedStep:
    """What a training step of MMSegmentation 0.x computes, ready to be traced."""

    module: "LoggedNetwork"
    """In training mode, on the meta device."""
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    images: Tensor
    target: Tensor
    """int64 (N, H, W), as the pipeline made it."""


class LoggedNetwork(nn.Module):
    """A segmentor whose forward is all that 0.x logged: (images, target) -> the loss that is differentiated."""

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The sum of all heads' losses, main head first: `BaseSegmentor._parse_losses` of 0.x."""
        compute: Any = self.segmentor.loss
        losses: dict[str, Any] = compute(images, _Batch(target.unsqueeze(1)))
        means = {
            name: value.mean() if isinstance(value, Tensor) else sum(one.mean() for one in value)
            for name, value in losses.items()
        }
        return torch.stack([value for name, value in means.items() if "loss" in name]).sum()


def build_step(config: Path, crop_size: tuple[int, int], batch_per_gpu: int) -> LoggedStep:
    """The step of a configuration file of MMSegmentation 1.2.2, as 0.x would have run it.

    Module and batch are on the meta device: they take no memory, and a tracer makes its twins from them.
    """
    install_mmcv_stand_in()
    import mmseg.models  # noqa: F401  (registers the networks)
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    _as_in_version_0()
    settings = Config.fromfile(config)
    network = settings.model
    network.pop("data_preprocessor", None)
    _without_pretrained(network)
    _restore_depth(network, config.stem)
    with DefaultScope.overwrite_default_scope("mmseg"), _OnMeta():
        segmentor = replace_sync_batch_norm(MODELS.build(network))
    return LoggedStep(
        LoggedNetwork(segmentor).train(),
        optimizer_of(settings.get("optim_wrapper", {}).get("optimizer", {})),
        torch.empty(batch_per_gpu, 3, *crop_size, device="meta"),
        torch.zeros(batch_per_gpu, *crop_size, dtype=torch.int64, device="meta"),
    )


class _OnMeta(TorchFunctionMode):
    """Makes tensors on the meta device, but those whose values constructors read: rates of stochastic depth."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() and func is not torch.linspace:
            kwargs.setdefault("device", "meta")
        return func(*args, **kwargs)


class _Batch(list[Any]):
    """What heads take for a list of data samples: one for each image, and all targets in one tensor, as in 0.x."""

    def __init__(self, target: Tensor) -> None:
        height, width = target.shape[-2:]
        sample = types.SimpleNamespace(metainfo={"img_shape": (height, width), "pad_shape": (height, width)})
        super().__init__([sample] * target.shape[0])
        self.target = target


def optimizer_of(settings: dict[str, Any]) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Makes the configured optimizer, parameter by parameter (foreach=False), the only way there was."""
    kind = getattr(torch.optim, settings.get("type", "SGD"))
    options = {name: value for name, value in settings.items() if name != "type"} or {"lr": 0.01, "momentum": 0.9}

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(
            [parameter for parameter in parameters if parameter.requires_grad], foreach=False, **options
        )
        return optimizer

    return make


def _without_pretrained(settings: Any) -> None:
    """Clear every "pretrained" and "init_cfg": weights' values do not matter."""
    if isinstance(settings, dict):
        for name in settings:
            if name in {"pretrained", "init_cfg"}:
                settings[name] = None
            else:
                _without_pretrained(settings[name])
    elif isinstance(settings, list | tuple):
        for one in settings:
            _without_pretrained(one)


def _restore_depth(settings: Any, name: str) -> None:
    """Let a residual network be as deep as its configuration's name says.

    fpn_r101_4xb4-160k_ade20k-512x512.py of 1.2.2 assigns `model` twice, and so loses the depth that 0.x had.
    """
    match = re.search(r"[_-]r(18|50|101)[b-]?", name)
    if match and "depth" in settings.backbone:
        settings.backbone.depth = int(match[1])


def accuracy_of_version_0(pred: Tensor, target: Tensor, **unused: Any) -> Tensor:
    """Share of right pixels as MMSegmentation 0.x logged it: a top-1 over all pixels, ignored ones too.

    mmseg/models/losses/accuracy.py, v0.5.0 to v0.20. Later versions select pixels, which fake tensors cannot.
    """
    _, labels = pred.topk(1, dim=1)
    correct = labels.transpose(0, 1).eq(target.unsqueeze(0).expand_as(labels.transpose(0, 1)))
    return correct[:1].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / target.numel())


def _as_in_version_0() -> None:
    """Let heads take a batch of targets as it is, and compute with shapes that do not depend on values.

    Where pixels are selected (hard example mining, binary cross-entropy), all are taken: the most that it can be.
    """
    from mmseg.models.decode_heads import ddr_head, decode_head, pid_head, point_head
    from mmseg.models.losses import cross_entropy_loss, dice_loss
    from mmseg.structures.sampler import ohem_pixel_sampler

    for module in (ddr_head, decode_head, pid_head, point_head):
        module.accuracy = accuracy_of_version_0
    decode_head.BaseDecodeHead._stack_batch_gt = _targets
    cross_entropy_loss._expand_onehot_labels = _onehot_labels
    ohem_pixel_sampler.OHEMPixelSampler.sample = _hard_pixels
    if not isinstance(dice_loss.dice_loss, _KeepingAllClasses):
        dice_loss.dice_loss = _KeepingAllClasses(dice_loss.dice_loss)


@dataclass(frozen=True)
class _KeepingAllClasses:
    """A loss that takes all classes: one to be ignored would be picked out by value."""

    loss: Callable[..., Tensor]

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        return self.loss(*args, **options | {"ignore_index": None})


def _targets(self: Any, batch: Any) -> Tensor:
    """The batch's; or those that a head has made of its own (STDC's boundaries)."""
    if isinstance(batch, _Batch):
        return batch.target
    return torch.stack([one.gt_sem_seg.data for one in batch])


def _onehot_labels(labels: Tensor, weights: Tensor | None, shape: torch.Size, ignore_index: int) -> Any:
    """mmseg/models/losses/cross_entropy_loss.py, `_expand_onehot_labels`, with every pixel valid."""
    onehot = labels.new_zeros(shape)
    valid = (labels >= 0) & (labels != ignore_index)
    indices = labels.new_zeros(labels.dim() + 1, labels.numel())
    del indices
    mask = valid.unsqueeze(1).expand(shape).float()
    return onehot, mask if weights is None else weights.unsqueeze(1).expand(shape) * mask, mask


@torch.no_grad()
def _hard_pixels(self: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """mmseg/structures/sampler/ohem_pixel_sampler.py, `OHEMPixelSampler.sample`, with every pixel valid."""
    labels = labels.squeeze(1).long()
    weights = logits.new_zeros(labels.shape)
    if self.thresh is None:
        losses: Any = 0.0
        decoders = self.context.loss_decode
        for loss in decoders if isinstance(decoders, nn.ModuleList) else [decoders]:
            losses += loss(
                logits, labels, weight=None, ignore_index=self.context.ignore_index, reduction_override="none"
            )
    else:
        losses = logits.softmax(1).gather(1, labels.clone().unsqueeze(1)).squeeze(1)
    order = losses.flatten().sort()[1]
    return weights.index_put((order[:1], order[:1] * 0, order[:1] * 0), weights.new_ones(1))
