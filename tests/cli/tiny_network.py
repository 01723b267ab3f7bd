"""A network that is profiled in no time, for questions that take many plans: tests/cli/tiny_network.py:build."""

from torch import nn


def build(num_classes=8):
    """Ten convolutions, and logits."""
    layers = [
        nn.Sequential(nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for n in range(10)
    ]
    return nn.Sequential(*layers, nn.Conv2d(8, num_classes, 1))
