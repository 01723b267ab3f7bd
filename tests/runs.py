"""Run folders as training leaves them, made without training: networks with the weights they were born with."""

import warnings

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

from memseg.models import build_model
from memseg.training.checkpoint import CHECKPOINTS_FOLDER, write_run
from memseg.training.recipe import parse_recipe

MODEL = "ladder-densenet-mini"


def untrained_run(folder, classes, *, steps=(3,), **data):
    """A run folder with a checkpoint after each of `steps` steps, all of other weights; its path.

    Args:
        classes: Of the data set.
        data: The recipe's data table.
    """
    values = {"name": "untrained", "data": data, "model": {"name": MODEL}, "schedule": {"steps": max(steps)}}
    write_run(folder, parse_recipe(values, "untrained"), classes)
    for step in steps:
        torch.manual_seed(step)
        model = build_model(MODEL, num_classes=len(classes.names))
        # With its own statistics such a network says the same of every pixel.
        model.train()(torch.rand(2, 3, 128, 128))
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        path = folder / CHECKPOINTS_FOLDER / f"step-{step:08d}"
        path.mkdir(parents=True)
        with warnings.catch_warnings():
            # That it writes in a single process is what `no_dist` asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_save({**state, "step": torch.tensor(step)}, storage_writer=FileSystemWriter(path), no_dist=True)
    return folder
