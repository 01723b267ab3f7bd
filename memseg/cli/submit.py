"""`memseg submit`: what the test servers of Cityscapes and Pascal VOC want to be sent."""

import argparse
from pathlib import Path

from memseg.cli.console import add_command, progress_bar
from memseg.cli.network_options import add_data_options, add_network_options, override_data, use_network


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Define the subcommand."""
    parser = add_command(
        subparsers,
        "submit",
        run,
        summary="Label a whole split for a test server, and pack what is uploaded.",
        examples=[
            "memseg submit runs/ldn169_cityscapes --format cityscapes --out submission",
            "memseg submit runs/ldn169_voc --format voc --scales 0.75,1,1.25 --flip --out submission",
            "memseg submit runs/ldn169_cityscapes --format cityscapes --split val --out val_submission",
        ],
    )
    add_network_options(parser)
    parser.add_argument("--format", required=True, choices=["cityscapes", "voc"], help="whose test server reads it")
    parser.add_argument("--split", default="test", help="split of the data set (default: test)")
    parser.add_argument(
        "--competition",
        choices=["comp5", "comp6"],
        default="comp6",
        help="of VOC: comp5 if nothing but VOC's own train and val was learnt from, comp6 if weights from ImageNet or "
        "labels from SBD were (default: comp6)",
    )
    add_data_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where pictures and archive go")
    parser.add_argument(
        "--overwrite", action="store_true", help="make pictures anew that are there; otherwise they are kept"
    )


def run(args: argparse.Namespace) -> int:
    """Write the pictures that are not there yet and the archive, and print where it is; 0.

    Raises:
        InputError: the run was trained on other classes, or the folder holds what another network made.
        DataError: the pictures of the split are not what the data set's layout promises.
        CheckpointError: no run lies there, or it has no such checkpoint.
    """
    from memseg.data import open_images
    from memseg.inference.submit import cityscapes_format, submit, voc_format, weights_digest

    form = voc_format(args.split, args.competition) if args.format == "voc" else cityscapes_format(args.split)
    network = use_network(args)
    network.check_classes(form.classes, f"a submission to {form.name}")
    recipe = override_data(network.trained.recipe, args.overrides)
    images = open_images(form.name, args.split, root=recipe.data.root)
    model = network.trained.model
    framing = network.framing(recipe)
    made_by = {
        **network.settings(),
        "weights": weights_digest(model),
        "split": args.split,
        "region": framing.region and list(framing.region),
        "size": framing.size and list(framing.size),
    }
    with progress_bar(f"{form.name} {args.split}") as progress:
        done = submit(
            model,
            images,
            args.out,
            form,
            made_by=made_by,
            device=network.device,
            framing=framing,
            precision=network.precision,
            overwrite=args.overwrite,
            progress=progress,
        )
    kept = f", {done.kept} of them there already" if done.kept else ""
    print(f"{done.images} pictures{kept}; to upload: {done.archive}")
    return 0
