"""Which colour is what: the same in every picture and page, on a light or a dark ground."""

from memseg.profiling.timeline import Category

CATEGORY_COLOURS = {
    Category.PARAMETER: "#5b6472",
    Category.OPTIMIZER_STATE: "#8d97a5",
    Category.INPUT: "#bac2cc",
    Category.GRADIENT: "#e2a90a",
    Category.COMMUNICATION: "#1f9e89",
    Category.AUTOCAST: "#8ab52c",
    Category.SAVED: "#2f7ed8",
    Category.TEMPORARY: "#e8743b",
    Category.WORKSPACE: "#8e4ec6",
}
"""In the order in which they are stacked: what stays all step at the bottom, what is brief on top."""


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour.

    >>> ink_on("#bac2cc"), ink_on("#5b6472")
    ('#000000', '#ffffff')
    """
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
