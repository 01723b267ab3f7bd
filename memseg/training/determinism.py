"""The same bits in every run of the same recipe on the same cards."""

import os
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Begin all sequences of random numbers that layers, or code of others, may draw from.

    Images, flips and crops are functions of the seed of their own and draw from none of these.

    Args:
        seed: 0 .. 2**32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)  # What others draw from.
    torch.manual_seed(seed)


def use_deterministic_algorithms() -> None:
    """From now on avoid kernels whose result depends on the order in which threads come; called before CUDA is used.

    torch warns of an operation that has no other kernel. On the CPU ours have; on CUDA it warns of linear upsampling.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # Fresh memory is not filled: that costs a pass over every tensor, and all of ours are written before they are read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # Its module has it.
    torch.use_deterministic_algorithms(True, warn_only=True)
