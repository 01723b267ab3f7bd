"""Samples in batches, decoded by other processes ahead of time.

Decoding a full-size frame takes longer than a GPU takes for it, so several processes decode while the last step runs.
They live as long as the run: what a sample looks like is in what is asked for, (epoch, index), so a new epoch needs no
new processes, and its first images are decoded during the last steps of the one before.
"""

from collections.abc import Iterable, Iterator
from itertools import tee

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from memseg.data.training_view import Place, TrainingView


def make_loader(
    view: TrainingView, batches: Iterable[list[Place]], *, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The samples of each batch, stacked: "image" float32 (N, 3, H, W), "target" uint8 (N, H, W); on the CPU.

    Args:
        view: What they are samples of.
        batches: (epoch, index) of the samples of each batch; asked for as far ahead as is decoded.
        workers: Processes that decode; each has two batches under way. 0 decodes in this one, when asked.
        device: Where the batches go from here; on the way to a CUDA device they lie in pinned memory.

    Raises:
        DataError: an image or target cannot be read.
    """
    given, expected = tee(batches)
    loaded = iter(DataLoader(view, batch_sampler=given, num_workers=workers, pin_memory=device.type == "cuda"))
    for batch in expected:
        try:
            samples = next(loaded)
        except RuntimeError:
            # A loading process can hand over the text of an error only; here the error itself is raised again.
            for place in batch:
                view[place]
            raise
        yield samples


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that a process that decodes was ended; it is raised wherever the run is at that moment.

    Source: `DataLoader._try_get_data`, and `_error_if_any_worker_fails` in torch/csrc/DataLoader.cpp, torch 2.14.1.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
