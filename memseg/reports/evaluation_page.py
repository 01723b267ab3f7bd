"""An evaluation as one HTML page: the worst pictures first, the classes with their scores, and what is taken for what.

It has no script and asks nothing of the network: pictures are inside it, and its content security policy lets nothing
run or load. Names of classes and pictures may be anything; they are escaped.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import memseg
from memseg.files import replace_file
from memseg.reports.single_file import asset, policy_hash

_NUMBER = ' class="number"'


@dataclass(frozen=True)
class ClassRow:
    """One class."""

    name: str
    colour: tuple[int, int, int]
    """Red, green, blue, 0 to 255."""
    share: float
    """Of all labelled pixels, 0 to 1."""
    iou: float | None
    """None where it appears nowhere."""
    iiou: float | None
    """None where it has none."""


@dataclass(frozen=True)
class Picture:
    """A picture and the line above it."""

    caption: str
    jpeg: bytes


def save_evaluation_page(
    path: Path,
    *,
    title: str,
    figures: Sequence[tuple[str, str, str]],
    classes: Sequence[ClassRow],
    confusion_png: bytes,
    worst: Sequence[Picture],
) -> None:
    """Write the page.

    Args:
        path: Of the HTML file.
        title: Of the page.
        figures: The scores on top, each as what it is, its value, and a note.
        classes: Rows of the table, in order.
        confusion_png: The confusion matrix as a picture.
        worst: The worst first.

    Raises:
        OSError: the file cannot be written.
    """
    style = asset("base.css") + asset("evaluation.css")
    page = Template(asset("evaluation.html")).substitute(
        title=escape(title),
        version=escape(memseg.__version__),
        style=style,
        style_hash=policy_hash(style),
        figures="".join(_figure(*figure) for figure in figures),
        classes=_table(classes),
        confusion=_data_uri(confusion_png, "png"),
        worst="".join(_picture(picture) for picture in worst) or "<p>None were asked for.</p>",
    )
    replace_file(path, page)


def _figure(name: str, value: str, note: str) -> str:
    return f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="note">{escape(note)}</dd></div>'


def _table(classes: Sequence[ClassRow]) -> str:
    """With a column for iIoU where some class has one."""
    single = any(row.iiou is not None for row in classes)
    heads = ["class", "of labelled pixels", "IoU", *(["iIoU"] if single else []), ""]
    head = "".join(f'<th scope="col"{"" if place == 0 else _NUMBER}>{name}</th>' for place, name in enumerate(heads))
    rows = "".join(_row(row, single) for row in classes)
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _row(row: ClassRow, single: bool) -> str:
    colour = "#{:02x}{:02x}{:02x}".format(*row.colour)
    swatch = f'<svg class="colour" aria-hidden="true"><rect width="14" height="14" fill="{colour}"/></svg>'
    bar = f'<rect width="{100 * (row.iou or 0):.2f}" height="8" fill="{colour}"/>'
    scale = f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'
    cells = [f"{row.share:.2%}", _percent(row.iou, "not there"), *([_percent(row.iiou, "")] if single else [])]
    numbers = "".join(f"<td{_NUMBER}>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{swatch}{escape(row.name)}</th>{numbers}<td>{scale}</td></tr>'


def _percent(share: float | None, otherwise: str) -> str:
    return otherwise if share is None else f"{share:.2%}"


def _picture(picture: Picture) -> str:
    caption = escape(picture.caption)
    image = f'<img alt="{caption}" src="{_data_uri(picture.jpeg, "jpeg")}" loading="lazy">'
    return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
