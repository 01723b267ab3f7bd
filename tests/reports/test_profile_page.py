"""The page is opened in a real browser, without a network, and told to show what the profile says."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from memseg.levels import Recompute
from memseg.models import build_model
from memseg.planning.cards import parse_cards
from memseg.profiling import foreign_job, named_optimizer, profile_step, trace_job
from memseg.profiling.card_memory import CardMemory
from memseg.profiling.device_memory import Term
from memseg.profiling.timeline import Category, Phase
from memseg.reports.colours import CATEGORY_COLOURS
from memseg.reports.page import profile_page, save_profile_page
from memseg.reports.phases import phase_spans
from memseg.reports.profile import ProfileReport
from memseg.reports.profile_view import fit_line
from memseg.reports.single_file import asset
from memseg.units import format_bytes, format_seconds

MIB = 2**20
ARROW = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
COMPUTED = {Category.SAVED, Category.TEMPORARY, Category.WORKSPACE}
NOTHING = "\N{EN DASH}"
HOSTILE_NAMES = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "\"&'",
    "<!--",
    "$title",
    "__proto__",
    "constructor",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves the page of a report, once; gives its address."""
    folder, pages = tmp_path_factory.mktemp("pages"), []

    def address(report):
        for known, path in pages:
            if known is report:
                return path.as_uri()
        path = folder / f"{len(pages)}.html"
        save_profile_page(report, path)
        pages.append((report, path))
        return path.as_uri()

    return address


@pytest.fixture
def show(browser, saved):
    """Opens the page of a report; at the end, nothing was asked of the network and nothing has failed."""
    opened, expected, requests, troubles = [], [], [], []

    def open_page(report, *, width=1280, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        opened.append(context)
        expected.append(saved(report))
        page.goto(saved(report))
        page.wait_for_selector("#curve path")
        return page

    yield open_page
    for context in opened:
        context.close()
    assert requests == expected
    assert troubles == []


class Hostile(nn.Module):
    """Layers with names that would do harm as markup or as keys."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict()
        for name in HOSTILE_NAMES:
            self.body.add_module(name, nn.Conv2d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, 200)

    def forward(self, images):
        for layer in self.body.children():
            images = layer(images).relu()
        return self.head(images.mean((2, 3)))


@pytest.fixture(scope="module")
def mini():
    """A network of ours on the CPU, which is asked whether it fits."""
    card = parse_cards("cpu:8GiB")[0]
    profile = profile_step(partial(build_model, "ladder-densenet-mini"), image=(128, 256), batch=1)
    memory = CardMemory(profile.peak_allocated_bytes)
    settings = {"image": "128x256", "batch": 1, "norm": "batch"}
    return ProfileReport(profile, card, memory, settings, judge_fit=True, measured_bytes=60 * MIB)


@pytest.fixture(scope="module")
def hostile():
    """Somebody's network on a GPU, whose optimizer has state; that is born in the first step."""
    images = torch.empty(4, 16, 32, 32, device="meta")
    job = partial(foreign_job, Hostile(), images, loss="mean", optimizer=named_optimizer("adam"), name="<b>hostile")
    profile = trace_job(job, device="cuda")
    tensors = profile.peak_allocated_bytes
    terms = (Term("cuBLAS", MIB, "made up", in_allocator=True), Term("CUDA context", 300 * MIB, "made up"))
    memory = CardMemory(tensors + MIB, tensors + 20 * MIB, tensors + 320 * MIB, terms)
    return ProfileReport(profile, parse_cards("v100")[0], memory)


def texts(page, selector):
    # What is SVG has no innerText.
    return page.locator(selector).evaluate_all("found => found.map(one => (one.innerText ?? one.textContent).trim())")


def plot(page):
    """Box of the plotted area in the window, and the instants that it shows."""
    svg = page.locator("#curve svg")
    box = page.locator("#curve .grid").first.bounding_box()
    view = svg.bounding_box()
    first, last = int(svg.get_attribute("data-left")), int(svg.get_attribute("data-right"))
    return box["x"], box["x"] + box["width"], view["y"] + 120, first, last


def point(page, instant):
    """The point of the window where an instant is drawn."""
    left, right, y, first, last = plot(page)
    return left + (right - left) * (instant + 0.5 - first) / (last - first), y


def zoom(page, instant):
    """Drag over a dozen instants, so that each has columns of its own."""
    for reach in (40, 6):
        _, _, _, first, last = plot(page)
        (start, y), (end, _) = point(page, max(first, instant - reach)), point(page, min(last - 1, instant + reach))
        page.mouse.move(start, y)
        page.mouse.down()
        page.mouse.move(end, y, steps=3)
        page.mouse.up()


def hovered(page, instant):
    page.mouse.move(*point(page, instant))
    return page.locator("#tooltip").inner_text()


def test_the_page_is_one_file_without_addresses(mini):
    page = profile_page(mini)
    # The names of two formats; what is loaded or executed beside them is forbidden by the page itself.
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == page.count("http-equiv")
    assert "default-src 'none'" in page
    assert len(page) < 300_000


def test_every_category_has_its_own_colour():
    assert set(CATEGORY_COLOURS) == set(Category)
    assert len(set(CATEGORY_COLOURS.values())) == len(CATEGORY_COLOURS)


def test_phases_cover_the_step_without_gaps(mini, hostile):
    for timeline in (mini.profile.timeline, hostile.profile.first_timeline):
        spans = phase_spans(timeline)
        assert [span.phase for span in spans][:2] == [Phase.FORWARD, Phase.BACKWARD]
        assert spans[1].start == timeline.backward_start
        assert all(one.end == other.start for one, other in pairwise(spans))
        assert all(span.start < span.end for span in spans)


def test_numbers_are_written_as_everywhere_else(browser):
    sizes = [0, 1, 512, 1023, 1024, 1280, 2**20 - 1, 3 * MIB, 102 * MIB, 128 * MIB, 640 * MIB, 11725260718, -(2**30)]
    seconds = [0.0, 0.0123, 0.00025, 0.99, 2.5, 119.0, 125.0, 4000.0]
    page = browser.new_page()
    units = asset("units.js")
    shown = page.evaluate(
        f"([sizes, times]) => {{ {units}; return [sizes.map(formatBytes), times.map(formatSeconds)]; }}",
        [sizes, seconds],
    )
    page.close()
    assert shown == [[format_bytes(size) for size in sizes], [format_seconds(time) for time in seconds]]


def test_the_figures_of_a_cpu_are_its_peak_whether_it_fits_and_what_was_measured(mini, show):
    page = show(mini)
    assert page.locator("#headline").inner_text() == mini.headline()
    figures = dict(zip(texts(page, "#figures dt"), texts(page, "#figures dd:not(.note)"), strict=True))
    assert figures["Allocated peak"] == format_bytes(mini.profile.peak_allocated_bytes)
    assert figures["Measured"] == "60.0 MiB"
    assert not {"Reserved peak", "Device total"} & set(figures)
    assert page.locator("#verdict.fits").inner_text() == fit_line(mini.memory.peak_allocated_bytes, mini.card)
    assert f"↑ {mini.card.name} has 7.80 GiB" in texts(page, "#curve .limit text")


def test_three_figures_of_a_gpu_are_told_apart(hostile, show):
    page = show(hostile)
    figures = dict(zip(texts(page, "#figures dt"), texts(page, "#figures dd:not(.note)"), strict=True))
    memory = hostile.memory
    told = [figures[name] for name in ("Allocated peak", "Reserved peak", "Device total")]
    expected = [memory.peak_allocated_bytes, memory.peak_reserved_bytes, memory.device_total_bytes]
    assert told == [format_bytes(size) for size in expected]
    assert "CUDA context 0.29 GiB" in page.locator("#figures").inner_text()
    assert page.locator("#verdict").is_hidden()


def test_the_curve_reaches_the_peak_and_stacks_the_categories_in_order(mini, show):
    page = show(mini)
    peak = mini.timeline.peak_allocated_bytes
    assert texts(page, "#curve text.peak") == [f"{format_bytes(peak)}, {mini.peak_moment}"]
    drawn = page.locator(".areas path").evaluate_all(
        "paths => paths.map(path => [path.dataset.category, path.getBBox().y])"
    )
    occurring = {one.category for one in mini.timeline.allocations if one.size_bytes}
    # What is on top is drawn first, for the others to cover.
    assert [name for name, _ in reversed(drawn)] == [category for category in CATEGORY_COLOURS if category in occurring]
    lines = page.locator("#curve .axes line.base, #curve .axes line.grid")
    heights = lines.evaluate_all(
        "lines => lines.map(line => [line.y1, line.y2].map(end => end.baseVal.value))"
        ".filter(([one, other]) => one === other).map(([height]) => height)"
    )
    ticks = [
        float(text.split()[0]) * MIB for text in texts(page, "#curve .axes text[text-anchor=end]") if "MiB" in text
    ]
    bytes_per_pixel = (ticks[-1] - ticks[0]) / (heights[0] - heights[-1])
    assert (heights[0] - drawn[0][1]) * bytes_per_pixel == pytest.approx(peak, abs=2 * bytes_per_pixel)
    assert texts(page, "#curve .phase-name")[:2] == ["forward", "backward"]


def test_a_peak_of_one_instant_is_drawn_where_many_share_a_pixel(mini, show):
    page = show(mini, width=360)
    top = page.locator(".areas path").first.evaluate("path => path.getBBox().y")
    mark = page.locator(".peak-mark").evaluate("mark => mark.getBBox().y + mark.getBBox().height")
    assert plot(page)[4] - plot(page)[3] > 3 * (plot(page)[1] - plot(page)[0])
    # The mark ends one pixel above.
    assert mark + 1 == pytest.approx(top, abs=0.1)


def test_of_the_peak_by_category_adds_up(mini, show):
    page = show(mini)
    told = dict(zip(texts(page, "#categories tbody th"), texts(page, "#categories td:nth-child(2)"), strict=False))
    expected = {str(category): format_bytes(size) for category, size in mini.timeline.by_category().items() if size}
    assert told == expected
    assert format_bytes(mini.timeline.peak_allocated_bytes) in texts(page, "#categories tfoot td")


def test_hovering_the_peak_names_what_is_allocated_there_and_the_largest_alive(mini, show):
    timeline = mini.timeline
    told = hovered(show(mini), timeline.peak_instant)
    (reached,) = (one for one in timeline.allocations if one.born == timeline.peak_instant)
    largest = timeline.alive(timeline.peak_instant)[0]
    assert told.startswith(format_bytes(timeline.peak_allocated_bytes))
    assert f"allocates {format_bytes(reached.size_bytes)}: {reached.layer}" in told
    assert reached.operation.removeprefix("aten.") in told
    assert format_bytes(largest.size_bytes) in told
    assert f"{largest.category} {largest.dtype} {'x'.join(map(str, largest.shape))}".strip() in told


@pytest.mark.parametrize("share", [0.2, 0.4, 0.9])
def test_every_instant_can_be_told_apart_after_zooming(mini, show, share):
    timeline = mini.timeline
    page = show(mini)
    spans = phase_spans(timeline)
    born = [one for one in timeline.allocations if one.phase is not Phase.SETUP and one.size_bytes]
    wanted = born[int(share * len(born))]
    zoom(page, wanted.born)
    told = hovered(page, wanted.born)
    assert told.startswith(format_bytes(timeline.curve[wanted.born]))
    assert f"{wanted.phase}, instant {wanted.born - spans[0].start:,}" in told
    assert f"allocates {format_bytes(wanted.size_bytes)}: {wanted.layer}" in told
    page.get_by_role("button", name="Whole step").click()
    assert plot(page)[3:] == (spans[0].start, spans[-1].end)


def test_an_instant_that_is_held_is_what_the_other_parts_show(mini, show):
    timeline = mini.timeline
    page = show(mini)
    born = [one.born for one in timeline.allocations if one.phase is Phase.FORWARD]
    instant = born[len(born) // 3]
    zoom(page, instant)
    page.mouse.click(*point(page, instant))
    told = format_bytes(timeline.curve[instant])
    assert texts(page, ".moment") == [f"{told} at instant {instant - phase_spans(timeline)[0].start:,}, forward"] * 2
    alive = [format_bytes(one.size_bytes) for one in timeline.alive(instant) if one.size_bytes]
    assert texts(page, "#alive tbody td:first-child") == alive[:40]
    page.mouse.dblclick(*point(page, instant))
    assert texts(page, ".moment")[0].startswith(format_bytes(timeline.peak_allocated_bytes))
    assert page.get_by_role("button", name="Back to the peak").count() == 0


def test_the_curve_obeys_the_keyboard(mini, show):
    timeline = mini.timeline
    page = show(mini)
    svg = page.locator("#curve svg")
    svg.focus()
    svg.press("End")
    assert page.locator("#tooltip").is_visible()
    assert int(svg.get_attribute("aria-valuenow")) > 0.9 * int(svg.get_attribute("aria-valuemax"))
    svg.press("Home")
    for _ in range(3):
        svg.press("ArrowRight")
    for _ in range(6):
        svg.press("+")
    assert plot(page)[4] - plot(page)[3] < timeline.instants / 30
    svg.press("Enter")
    assert page.get_by_role("button", name="Back to the peak").count() == 2
    svg.press("Escape")
    assert plot(page)[4] == phase_spans(timeline)[-1].end
    assert page.locator("#tooltip").is_hidden()


def test_areas_of_the_treemap_are_proportional_to_bytes(mini, show):
    page = show(mini)
    groups = page.locator("#treemap > .group").evaluate_all(
        "groups => groups.map(group => [group.dataset.layer, Number(group.dataset.bytes), "
        "group.getBoundingClientRect().width * group.getBoundingClientRect().height])"
    )
    whole = page.locator("#treemap").evaluate("place => place.clientWidth * place.clientHeight")
    alive = mini.timeline.alive(mini.timeline.peak_instant)
    for layer, size, area in groups:
        if not layer.startswith("("):
            assert size == sum(one.size_bytes for one in alive if one.layer.split(".")[0] == layer)
        assert area / whole == pytest.approx(size / mini.timeline.peak_allocated_bytes, rel=0.01, abs=1e-4)
    assert sum(area for _, _, area in groups) == pytest.approx(whole, rel=0.01)


def test_the_treemap_goes_into_a_layer_and_back(mini, show):
    page = show(mini)
    name = page.locator("#treemap > .group:not([data-layer^='('])").first.get_attribute("data-layer")
    page.locator(f"#treemap [data-layer='{name}']").press("Enter")
    inside = sum(
        one.size_bytes
        for one in mini.timeline.alive(mini.timeline.peak_instant)
        if f"{one.layer}.".startswith(f"{name}.")
    )
    assert page.locator("#path").inner_text() == (
        f"{mini.profile.model} {format_bytes(mini.timeline.peak_allocated_bytes)} {ARROW} {name} {format_bytes(inside)}"
    )
    page.locator("#treemap .tensor").first.hover()
    assert name in page.locator("#tooltip").inner_text()
    page.locator("#path button").click()
    assert page.locator("#path button").count() == 0
    page.locator(f"#treemap [data-layer='{name}'] .tensor").first.click()
    assert page.locator("#path [aria-current]").inner_text().startswith(name)


def test_what_is_alive_is_told_with_makers_readers_and_levels(mini, show):
    page = show(mini)
    rows = page.locator("#alive tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    expected = [
        [
            format_bytes(one.size_bytes),
            str(one.category),
            one.made_by or ("(model)" if one.category in COMPUTED else ""),
            one.operation.removeprefix("aten."),
            f"{one.dtype} {'x'.join(map(str, one.shape))}".strip(),
            f"{one.waits_for[0]} of {one.waits_for[1] or 'the step'}" if one.waits_for else "",
            one.removed_by or "",
        ]
        for one in mini.alive
    ]
    assert rows == expected[:40]
    assert {row[-1] for row in rows} & set(Recompute)
    page.locator("#alive-all").click()
    assert page.locator("#alive tbody tr").count() == len(mini.alive)
    page.get_by_label("Filter what is alive").fill("workspace")
    assert all("workspace" in text for text in texts(page, "#alive tbody tr"))


def cells(page, column):
    """Lines of the table of layers: the name and one figure of each."""
    return page.locator("#layers tbody tr").evaluate_all(
        f"rows => rows.map(row => [row.cells[0].innerText.replace(/[▸▾]/, '').trim(), row.cells[{column}].innerText])"
    )


@pytest.mark.parametrize(
    ("title", "column", "value", "tell"),
    [
        ("saved", 1, lambda row: row.saved_bytes, format_bytes),
        ("peak", 2, lambda row: row.peak_bytes, format_bytes),
        ("parameters", 3, lambda row: row.parameter_bytes, format_bytes),
        ("backward", 5, lambda row: row.backward_s, format_seconds),
    ],
)
def test_layers_are_sorted_by_number_and_not_by_text(mini, show, title, column, value, tell):
    page = show(mini)
    rows = mini.rows(depth=1)
    unsorted = cells(page, column)
    assert [name for name, _ in unsorted] == [row.name for row in rows]
    heading = page.locator("#layers th", has=page.get_by_role("button", name=title, exact=True))
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    largest_first = sorted(rows, key=lambda row: -value(row))
    assert [text for _, text in cells(page, column)] == [
        tell(value(row)) if value(row) else NOTHING for row in largest_first
    ]
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    smallest = min(rows, key=value)
    assert cells(page, column)[0][1] == (tell(value(smallest)) if value(smallest) else NOTHING)
    heading.get_by_role("button").click()
    assert cells(page, column) == unsorted


def test_layers_add_up_and_open_to_what_they_hold(mini, show):
    page = show(mini)
    rows = mini.rows(depth=None)
    totals = texts(page, "#layers tfoot td")
    assert totals[1] == format_bytes(sum(row.saved_bytes for row in rows))
    assert totals[2] == format_bytes(mini.profile.timeline.peak_allocated_bytes)
    assert totals[3] == format_bytes(sum(row.parameter_bytes for row in rows))
    holder = next(row.name.split(".")[0] for row in rows if "." in row.name)
    closed = page.locator("#layers tbody tr").count()
    page.get_by_role("button", name=f"Open {holder}", exact=True).press("Enter")
    assert page.get_by_role("button", name=f"Close {holder}", exact=True).get_attribute("aria-expanded") == "true"
    inner = {row.name.split(".")[1] for row in rows if row.name.startswith(f"{holder}.")}
    shown = [name for name, _ in cells(page, 1)]
    assert inner < set(shown)
    assert len(shown) == closed + len(inner) + ("(itself)" in shown)
    page.get_by_role("button", name="Expand all").click()
    names = {part for row in rows for part in row.name.split(".")}
    assert {name for name, _ in cells(page, 1)} == names | ({"(itself)"} if "(itself)" in shown else set())
    page.get_by_role("button", name="Collapse all").click()
    assert page.locator("#layers tbody tr").count() == closed


def test_searching_a_layer_opens_the_way_to_it(mini, show):
    page = show(mini)
    wanted = next(row.name for row in mini.rows(depth=None) if row.name.count(".") == 2)
    page.get_by_label("Filter layers").fill(wanted.upper())
    assert [name for name, _ in cells(page, 1)] == wanted.split(".")
    assert page.locator("#layers-count").inner_text() == "1 found"
    page.get_by_label("Filter layers").fill("no such layer")
    assert cells(page, 1) == []
    page.get_by_label("Filter layers").fill("")
    assert [name for name, _ in cells(page, 1)] == [row.name for row in mini.rows(depth=1)]


def test_names_that_are_markup_are_only_shown(hostile, show):
    page = show(hostile)
    assert page.locator("#headline").inner_text() == hostile.headline()
    assert page.title() == "<b>hostile, memseg profile"
    assert page.locator("script").count() == 2
    assert page.locator("img, b").count() == 0
    page.get_by_role("button", name="Expand all").click()
    assert {name for name, _ in cells(page, 1)} >= set(HOSTILE_NAMES)
    page.locator("#treemap [data-layer=body]").click()
    groups = page.locator("#treemap > .group").evaluate_all("groups => groups.map(group => group.dataset.layer)")
    assert set(groups) == set(HOSTILE_NAMES)
    for index in range(len(HOSTILE_NAMES)):
        page.locator("#treemap > .group").nth(index).hover()
    page.locator("#alive-all").click()
    makers = set(texts(page, "#alive tbody td:nth-child(3)"))
    assert makers >= {f"body.{name}" for name in HOSTILE_NAMES}


def test_first_and_steady_step_can_be_compared(hostile, mini, show):
    page = show(hostile)
    profile = hostile.profile
    assert profile.first_timeline != profile.timeline
    for name, timeline in {"first step": profile.first_timeline, "steady step": profile.timeline}.items():
        button = page.get_by_role("button", name=name)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert texts(page, "#curve text.peak")[0].startswith(format_bytes(timeline.peak_allocated_bytes))
        states = timeline.by_category()[Category.OPTIMIZER_STATE]
        assert ("optimizer state" in texts(page, "#categories tbody th")) == (states > 0)
        assert texts(page, "#alive tbody td:first-child")[0] == format_bytes(
            timeline.alive(timeline.peak_instant)[0].size_bytes
        )


def test_where_all_steps_are_the_same_there_is_nothing_to_choose(mini, show):
    profile = trace_job(
        partial(foreign_job, nn.Linear(8, 8), torch.empty(2, 8, device="meta"), optimizer=named_optimizer("sgd"))
    )
    page = show(ProfileReport(profile, mini.card, CardMemory(profile.peak_allocated_bytes)))
    assert page.locator("#steps").is_hidden()


@pytest.mark.parametrize("width", [480, 1000, 2000])
def test_the_page_fits_windows_of_any_width(mini, show, width):
    page = show(mini, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    drawn = page.locator("#curve svg").bounding_box()
    assert 0 <= drawn["x"] < drawn["x"] + drawn["width"] <= width
    page.set_viewport_size({"width": 800, "height": 900})
    page.wait_for_function("document.querySelector('#curve svg').viewBox.baseVal.width < 780")
    assert page.locator(".areas path").count() > 3


def test_dark_windows_get_a_dark_page(mini, show):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (show(mini, scheme=scheme).evaluate(ground) for scheme in ("light", "dark"))
    assert light == "rgb(245, 246, 248)"
    assert dark == "rgb(15, 18, 22)"
