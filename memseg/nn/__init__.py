"""Layers that keep far fewer activations from forward to backward, at the plain network's gradients."""

from memseg.nn.batch_norm import BatchNorm2d, statistics_paused
from memseg.nn.chains import fused_kernels
from memseg.nn.convert import Conversion, convert
from memseg.nn.dense_block import DenseBlock, DenseLayer
from memseg.nn.loss import IGNORE_INDEX, banded_cross_entropy
from memseg.nn.norm_relu_conv import Blend, NormReluConv, norm_relu_conv
from memseg.nn.recompute import rebuild, recompute
from memseg.nn.residual import Bottleneck, ResidualLayer
from memseg.nn.stem import conv_norm_relu_pool

__all__ = [
    "IGNORE_INDEX",
    "BatchNorm2d",
    "Blend",
    "Bottleneck",
    "Conversion",
    "DenseBlock",
    "DenseLayer",
    "NormReluConv",
    "ResidualLayer",
    "banded_cross_entropy",
    "conv_norm_relu_pool",
    "convert",
    "fused_kernels",
    "norm_relu_conv",
    "rebuild",
    "recompute",
    "statistics_paused",
]
