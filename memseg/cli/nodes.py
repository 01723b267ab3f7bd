"""The options that tell which machines take part in a run: the same command line may be given on each of them."""

import argparse
import os
from typing import TYPE_CHECKING

from memseg.errors import InputError

if TYPE_CHECKING:
    from memseg.running import Nodes

_RANK_VARIABLES = ("NODE_RANK", "SLURM_NODEID")
"""Where a job's own launcher leaves the number of the machine."""


def add_nodes_options(parser: argparse.ArgumentParser) -> None:
    """--nnodes, --node-rank, --master-addr and --master-port, named as torchrun names them."""
    group = parser.add_argument_group("several machines", "give the same command on each; they share the run folder")
    group.add_argument("--nnodes", type=int, metavar="N", help="machines that take part (default: this one)")
    group.add_argument(
        "--node-rank",
        type=int,
        metavar="I",
        help=f"number of this machine, from 0 (default: {' or '.join(f'${name}' for name in _RANK_VARIABLES)})",
    )
    group.add_argument("--master-addr", metavar="HOST", help="machine 0, as the others reach it")
    group.add_argument("--master-port", type=int, metavar="P", help="a free port on machine 0 (default: 29500)")


def nodes_of(args: argparse.Namespace) -> "Nodes":
    """The machines that the options name.

    Raises:
        InputError: the options contradict each other, or one is missing.
    """
    from memseg.running import Nodes

    if args.nnodes is None:
        given = [name for name in ("node_rank", "master_addr", "master_port") if getattr(args, name) is not None]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for several machines; say how many: --nnodes 2")
        return Nodes()
    if args.nnodes < 1:
        raise InputError(f"--nnodes must be at least 1, got {args.nnodes}")
    rank = _rank_of(args)
    if not 0 <= rank < args.nnodes:
        raise InputError(
            f"the number of this machine must be 0 to {args.nnodes - 1} with --nnodes {args.nnodes}, got {rank}"
        )
    if args.nnodes > 1 and not args.master_addr:
        raise InputError(f"{args.nnodes} machines need to find machine 0; give its address: --master-addr HOST")
    port = Nodes.port if args.master_port is None else args.master_port
    if not 1 <= port <= 65535:
        raise InputError(f"--master-port must be 1 to 65535, got {port}")
    return Nodes(args.nnodes, rank, args.master_addr or "", port)


def _rank_of(args: argparse.Namespace) -> int:
    if args.node_rank is not None:
        return int(args.node_rank)
    if args.nnodes == 1:
        return 0
    for name in _RANK_VARIABLES:
        if text := os.environ.get(name):
            try:
                return int(text)
            except ValueError:
                raise InputError(f"{name} must be the number of this machine, got {text!r}") from None
    raise InputError(
        f"--nnodes {args.nnodes} needs the number of this machine; give --node-rank, from 0 to {args.nnodes - 1}"
    )
