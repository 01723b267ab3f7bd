"""Every shape of network that there is, as small as it can be."""

import torch

from memseg.models.context import PyramidPooling
from memseg.models.densenet import DenseNetConfig
from memseg.models.ladder import Architecture, build_architecture
from memseg.models.resnet import ResNetConfig

BLOCKS = (2, 1, 1, 2)
ARCHITECTURES = {
    "ladder-densenet": Architecture(DenseNetConfig(16, BLOCKS, 16), width=16, context_width=16),
    "ladder-densenet-spp": Architecture(
        DenseNetConfig(16, BLOCKS, 16), context=PyramidPooling, width=16, context_width=16
    ),
    "dilated-densenet": Architecture(
        DenseNetConfig(16, BLOCKS, 16, halved=(), dilations=(1, 1, 2, 4)), joined=1, width=16, context_width=16
    ),
    "ladder-resnet": Architecture(ResNetConfig((1, 1, 1, 1), width=16), width=16, context_width=16),
}


def small_network(kind, *, num_classes=3, dtype=torch.float32):
    """One of ARCHITECTURES in eval mode, its norms as training may leave them: some negative, some of weight nought."""
    torch.manual_seed(0)
    model = build_architecture(kind, ARCHITECTURES[kind], num_classes=num_classes).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.running_mean, module.weight.data, module.bias.data):
                value.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data[0] = 0
    return model
