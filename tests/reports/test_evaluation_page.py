"""The page of an evaluation, and its confusion matrix as a picture."""

import base64
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from memseg.reports.confusion import save_confusion_picture
from memseg.reports.evaluation_page import ClassRow, Picture, save_evaluation_page
from memseg.reports.single_file import policy_hash

HOSTILE = '<b>"road" & $co</b>'


class Reader(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self):
        super().__init__()
        self.elements, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def picture(kind, colour):
    content = BytesIO()
    Image.new("RGB", (4, 4), colour).save(content, format=kind)
    return content.getvalue()


@pytest.fixture
def page(tmp_path):
    rows = [ClassRow(HOSTILE, (128, 64, 128), 0.75, 0.5, None), ClassRow("car", (0, 0, 142), 0.25, None, 0.125)]
    save_evaluation_page(
        tmp_path / "index.html",
        title=HOSTILE,
        figures=[("mIoU", "50.00%", "mean over 1 of 2 classes")],
        classes=rows,
        confusion_png=picture("PNG", "white"),
        worst=[Picture(f"1. {HOSTILE}", picture("JPEG", "red")), Picture("2. other", picture("JPEG", "blue"))],
    )
    text = (tmp_path / "index.html").read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_names_that_are_markup_are_only_shown(page):
    text, reader = page
    assert not reader.of("b")
    assert not reader.of("script")
    assert reader.text.count(HOSTILE) == 3  # title, heading, class
    assert reader.of("img")[0]["alt"] == f"1. {HOSTILE}"
    assert "<b>" not in text


def test_the_page_asks_nothing_of_the_network(page):
    text, reader = page
    style = text.partition("<style>")[2].partition("</style>")[0]
    (policy,) = [meta["content"] for meta in reader.of("meta") if "http-equiv" in meta]
    assert policy == f"default-src 'none'; img-src data:; style-src '{policy_hash(style)}'"
    assert all(image["src"].startswith("data:image/") for image in reader.of("img"))
    assert not [attributes for _, attributes in reader.elements if {"style", "href"} & set(attributes)]


def test_pictures_are_in_it_the_worst_first_and_the_matrix_last(page):
    _, reader = page
    shown = [Image.open(BytesIO(base64.b64decode(image["src"].partition(",")[2]))) for image in reader.of("img")]
    assert [one.getpixel((0, 0)) for one in shown] == [(254, 0, 0), (0, 0, 254), (255, 255, 255)]


def test_classes_have_their_scores_and_bars_in_their_colours(page):
    _, reader = page
    cells = [text for text in reader.text if text.strip()]
    start = cells.index("iIoU") + 1
    assert cells[start : start + 6] == [HOSTILE, "75.00%", "50.00%", "car", "25.00%", "not there"]
    assert cells[start + 6] == "12.50%"
    bars = [(bar["width"], bar["fill"]) for bar in reader.of("rect") if bar["height"] == "8"]
    assert bars == [("50.00", "#804080"), ("0.00", "#00008e")]


@pytest.mark.parametrize("num_classes", [2, 11, 40])
def test_the_matrix_is_drawn_row_by_row_in_percent(tmp_path, num_classes):
    counts = np.zeros((num_classes, num_classes), np.int64)
    counts[0] = [1, *[0] * (num_classes - 2), 3]
    counts[1, 1] = 10**9
    names = ["$_{broken$", *(f"a class whose name is very long, number {n}" for n in range(num_classes - 1))]
    save_confusion_picture(counts, names, tmp_path / "matrix.png", title="50 $ of it")
    pixels = np.asarray(Image.open(tmp_path / "matrix.png").convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) >= 600
    # The darkest blue is what the whole row of class 1 is; grey rows are there where nothing is true.
    assert (pixels == [8, 48, 107]).all(axis=2).sum() > 20
    grey = (pixels == [232, 232, 232]).all(axis=2).sum()
    assert (grey > 500) == (num_classes > 2)
