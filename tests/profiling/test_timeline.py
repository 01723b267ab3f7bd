"""A step small enough to add up in the head."""

from memseg.profiling.timeline import Allocation, Category, LayerRow, Phase, Timeline, nearest_layer

STEP = Timeline(
    (
        Allocation(100, 0, 10, Phase.SETUP, Category.PARAMETER, "block1.denselayer1.conv1"),
        Allocation(10, 1, 10, Phase.SETUP, Category.INPUT, ""),
        Allocation(40, 2, 8, Phase.FORWARD, Category.SAVED, "block1.denselayer1"),
        Allocation(5, 3, 4, Phase.FORWARD, Category.TEMPORARY, "block1"),
        # Backward begins at instant 5.
        Allocation(30, 5, 7, Phase.BACKWARD, Category.TEMPORARY, "block1.denselayer1.norm1"),
        Allocation(50, 6, 9, Phase.BACKWARD, Category.GRADIENT, "block1"),
    ),
    instants=10,
    backward_start=5,
)


def test_the_curve_counts_what_is_allocated_after_each_instant():
    assert STEP.curve == [100, 110, 150, 155, 150, 180, 230, 200, 160, 110]


def test_the_peak_has_its_moment_its_inhabitants_and_its_categories():
    assert (STEP.peak_allocated_bytes, STEP.peak_instant) == (230, 6)
    assert STEP.peak_moment == (Phase.BACKWARD, "block1")
    assert [one.size_bytes for one in STEP.alive(6)] == [100, 50, 40, 30, 10]
    peak = dict.fromkeys(Category, 0)
    peak |= {
        Category.PARAMETER: 100,
        Category.INPUT: 10,
        Category.SAVED: 40,
        Category.TEMPORARY: 30,
        Category.GRADIENT: 50,
    }
    assert STEP.by_category() == peak
    assert STEP.by_category(3)[Category.TEMPORARY] == 5


def test_a_layer_is_charged_with_what_is_below_it_unless_that_is_listed_too():
    assert STEP.layers(["block1"]) == [LayerRow("block1", 100, 40, 230)]
    assert STEP.layers(["block1", "block1.denselayer1", "block2"]) == [
        LayerRow("block1", 0, 0, 230),
        LayerRow("block1.denselayer1", 100, 40, 180),
        LayerRow("block2", 0, 0, 0),
    ]


def test_the_nearest_layer_is_a_whole_name_not_a_prefix():
    assert nearest_layer("block10.denselayer1", {"block1", "block10"}) == "block10"
    assert nearest_layer("block10.denselayer1", {"block1"}) == ""
    assert nearest_layer("", {"block1"}) == ""


def test_an_empty_step_has_no_peak():
    empty = Timeline((), 0, 0)
    assert (empty.peak_allocated_bytes, empty.peak_instant, empty.peak_moment) == (0, 0, (Phase.SETUP, ""))
