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
