"""The page of a plan is opened in a real browser, without a network."""

import json

import pytest
from plan_cases import CASES, LADDER, card, infeasible, other, plan, replicate, replicate_split, single, split

from memseg.levels import Strategy
from memseg.planning import Plan
from memseg.reports.plan import cards_in_order, settings_line, shortage_lines, strategy_line
from memseg.reports.plan_page import plan_page
from memseg.reports.plan_parts import LEVEL_COLOURS, LEVEL_WORDS, memory_parts
from memseg.units import GIB, format_bytes, format_seconds

HOSTILE_NAMES = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "\"&'",
    "<!--",
    "$title",
    "__proto__",
    "constructor",
    "loss",
]


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of a plan; at the end, nothing was asked of the network and nothing has failed."""
    opened, expected, requests, troubles = [], [], [], []

    def open_page(value, *, width=1400, scheme="light"):
        path = tmp_path / f"{len(opened)}.html"
        path.write_text(plan_page(value), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
        opened.append(context)
        expected.append(path.as_uri())
        page.goto(path.as_uri())
        page.wait_for_selector(".segment")
        return page

    yield open_page
    for context in opened:
        context.close()
    assert [url for url in requests if not url.startswith("blob:")] == expected
    assert troubles == []


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def texts(page, selector):
    return page.locator(selector).evaluate_all("found => found.map(one => one.innerText.trim())")


def boxes(page, selector):
    """Left, top, width and height of each element."""
    return page.locator(selector).evaluate_all(
        "found => found.map(one => one.getBoundingClientRect()).map(box => [box.left, box.top, box.width, box.height])"
    )


def test_the_page_is_one_file_without_addresses(case):
    page = plan_page(case)
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == page.count("http-equiv")
    assert "default-src 'none'" in page
    assert len(page) < 100_000


def test_every_segment_of_every_card_is_drawn_with_its_level(case, show):
    page = show(case)
    drawn = page.locator(".lane").evaluate_all(
        "lanes => lanes.map(lane => [...lane.querySelectorAll('.segment')].map(one => "
        "[one.dataset.name, one.dataset.level, one.innerText.trim()]))"
    )
    cards = cards_in_order(case)
    assert drawn == [[[one.name, one.recompute, one.name] for one in card.segments] for card in cards]
    names = [name for lane in drawn for name, _, _ in lane]
    assert all(names.count(name) == case.replicas for name in LADDER)
    assert texts(page, ".card-head strong") == [card.card for card in cards]
    assert len(texts(page, ".replica h3")) == (case.replicas if case.replicas > 1 else 0)
    used = {one.recompute for card in case.cards for one in card.segments}
    told = [text for text in texts(page, "#levels li") if not text.startswith("→")]
    assert told == [f"{level}: {LEVEL_WORDS[level]}" for level in LEVEL_COLOURS if level in used]


def test_the_header_tells_what_fits_and_how_fast(case, show):
    page = show(case)
    assert page.locator("#headline").inner_text() == strategy_line(case)
    assert page.locator("#settings").inner_text() == settings_line(case)
    assert page.locator("#verdict").get_attribute("class") == ("fits" if case.feasible else "too-much")
    if not case.feasible:
        assert texts(page, "#verdict p") == shortage_lines(case)
    figures = dict(zip(texts(page, "#figures dt"), texts(page, "#figures dd:not(.note)"), strict=True))
    assert figures["Speed"] == f"{case.images_per_second:.2f} images/s"
    assert figures["Step"] == format_seconds(case.step_seconds)
    assert ("Between cards" in figures) == (case.transfer_seconds > 0)
    assert ("Micro-batches" in figures) == (case.micro_batches > 1)


def test_a_split_is_a_staircase_with_an_arrow_to_each_next_card(show):
    for value, crossings in ((single(), 0), (split(), 1), (replicate(), 0), (replicate_split(), 2)):
        page = show(value)
        assert page.locator(".crossing").count() == crossings
        tops = [top for _, top, _, _ in boxes(page, ".replica:first-child .segment")]
        assert tops == sorted(set(tops))
        assert len(tops) == len(LADDER)


def test_bars_have_one_scale_and_their_parts_add_up(case, show):
    page = show(case)
    drawn = page.locator(".memory-bar").evaluate_all(
        "bars => bars.map(bar => [bar.querySelector('.capacity').getBoundingClientRect().height, "
        "[...bar.querySelectorAll('.part')].map(part => [Number(part.dataset.bytes), part.offsetHeight, "
        "part.getBoundingClientRect().height])])"
    )
    scale = max(max(card.capacity_bytes, card.needed_bytes) for card in case.cards)
    highest = boxes(page, ".memory-bar")[0][3]
    for card_plan, (capacity, parts) in zip(cards_in_order(case), drawn, strict=True):
        assert [size for size, _, _ in parts] == [part.size_bytes for part in memory_parts(card_plan)]
        assert capacity == pytest.approx(highest * card_plan.capacity_bytes / scale, abs=0.1)
        for size, _, height in parts:
            assert height == pytest.approx(highest * size / scale, abs=0.1)
        if card_plan.fits:
            assert sum(height for _, _, height in parts) == pytest.approx(capacity, abs=0.2)
    assert page.locator(".short").count() == sum(not card_plan.fits for card_plan in case.cards)


def test_pointing_at_a_segment_tells_its_name_level_and_card(show):
    page = show(replicate_split())
    page.locator(".segment[data-name=block3]").nth(1).hover()
    told = page.locator("#tooltip").inner_text()
    assert told.splitlines()[0] == "block3"
    for words in ("units: rebuilds units", "t4", "replica 2 of 2, node 1, stage 1 of 2", "8 of 22"):
        assert words in told
    # It is marked in both replicas.
    assert page.locator(".segment.same").evaluate_all("found => found.map(one => one.dataset.name)") == ["block3"] * 2
    page.mouse.move(2, 2)
    assert page.locator("#tooltip").is_hidden()
    assert page.locator(".segment.same").count() == 0


def test_segments_can_be_reached_by_keys(show):
    page = show(split())
    page.locator(".segment").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.locator("#tooltip").inner_text().startswith(LADDER[1])
    page.keyboard.press("Tab")
    assert page.locator("#tooltip").inner_text().startswith(LADDER[5])


def test_pointing_at_a_part_of_the_memory_tells_its_bytes(show):
    page = show(split())
    part = next(part for part in memory_parts(split().cards[1]) if part.name == "saved activation")
    page.locator(".memory").nth(1).locator(".part[data-part='saved activation']").hover()
    told = page.locator("#tooltip").inner_text()
    assert told.startswith(f"saved activation: {format_bytes(part.size_bytes)}")
    for words in (f"{part.size_bytes:,}", f"{100 * part.size_bytes / (24 * GIB):.1f} %", "cpu:24GiB", "backward of"):
        assert words in told
    assert page.locator(".parts .meant").inner_text().split("\n")[-1] == "saved activation"
    page.locator(".memory").first.locator("li[data-part=reserve]").hover()
    assert page.locator("#tooltip").inner_text().startswith("reserve: 0.75 GiB")


def column(page, table, number):
    return texts(page, f"#{table} tbody td:nth-child({number})")


def test_tables_are_sorted_by_number_and_not_by_text(show):
    page = show(single())
    assert column(page, "alternatives", 1) == ["split", "replicate-split", "single"]
    assert column(page, "alternatives", 7) == ["72 %", "93 %", "100 %"]
    heading = page.locator("#alternatives").get_by_role("button", name="images/s")
    heading.click()
    assert column(page, "alternatives", 5) == ["12.50", "9.00", "1.75"]
    page.locator("#alternatives").get_by_role("button", name="images/s").click()
    assert column(page, "alternatives", 5) == ["1.75", "9.00", "12.50"]
    page.locator("#alternatives").get_by_role("button", name="fullest card").click()
    assert column(page, "alternatives", 7) == ["100 %", "93 %", "72 %"]
    page.locator("#alternatives").get_by_role("button", name="strategy").click()
    assert column(page, "alternatives", 1) == ["replicate-split", "single", "split"]
    assert column(page, "alternatives", 2)[0] == "4 x v100 (4)"


def test_the_table_of_cards_has_what_tells_them_apart(show):
    page = show(replicate_split())
    assert texts(page, "#cards th")[:4] == ["card", "node", "replica", "stage"]
    rows = list(zip(*(column(page, "cards", number) for number in (1, 2, 3, 4, 5)), strict=True))
    assert rows == [
        ("t4", "0", "1", "1", "4"),
        ("v100", "0", "1", "2", "4"),
        ("t4", "1", "2", "1", "4"),
        ("v100", "1", "2", "2", "4"),
    ]
    assert texts(show(single()), "#cards th")[:2] == ["card", "images"]


def test_without_runners_up_there_is_no_table_of_them(show):
    page = show(plan(Strategy.SINGLE, card("t4", LADDER), alternatives=()))
    assert page.locator("#alternatives-section").is_hidden()


def test_the_plan_can_be_taken_out_of_the_page(case, show):
    page = show(case)
    page.locator("summary").click()
    assert Plan.from_json(page.locator("#json").inner_text(), "page") == case
    with page.expect_download() as download:
        page.get_by_role("button", name="Download plan.json").click()
    assert download.value.suggested_filename == "plan.json"
    assert Plan.from_json(download.value.path().read_text(encoding="utf-8"), "download") == case


def test_names_that_are_markup_are_only_shown(show):
    hostile = plan(
        Strategy.SINGLE,
        card("<b>card</b>", HOSTILE_NAMES).model_copy(update={"by_category": {"<i>cache</i>": 6 * GIB}}),
        model="<b>hostile</b>",
        alternatives=(other(Strategy.SINGLE, ("<u>t4</u>",), (2,), ("<s>stem</s>",), 1.0, 0.5),),
    )
    page = show(hostile)
    assert page.title() == "<b>hostile</b>, memseg plan"
    assert page.locator("script").count() == 2
    assert page.locator("img, b, i, u, s").count() == 0
    shown = page.locator(".segment").evaluate_all("found => found.map(one => one.dataset.name)")
    assert shown == HOSTILE_NAMES
    for index, name in enumerate(HOSTILE_NAMES):
        page.locator(".segment").nth(index).hover()
        assert page.locator("#tooltip strong").inner_text() == name
    page.locator(".part").first.hover()
    assert page.locator("#tooltip strong").inner_text() == "<i>cache</i>: 6.00 GiB"
    assert column(page, "cards", 1) == ["<b>card</b>"]
    assert column(page, "alternatives", 2) == ["<u>t4</u> (2)"]
    assert json.loads(page.locator("#json").evaluate("place => place.textContent"))["model"] == "<b>hostile</b>"


def test_long_names_keep_both_ends(show):
    whole = "backbone.encoder.layers.3.attention.self.query_key_value_projection"
    names = [f"backbone.encoder.layers.{i}." + "attention." * 20 + f"projection{i}" for i in range(3)]
    page = show(plan(Strategy.SINGLE, card("t4", [*names, whole, "loss"])))
    shown = texts(page, ".segment span")
    assert shown[3:] == [whole, "loss"]
    for text, name in zip(shown, names, strict=False):
        start, end = text.split("…")
        assert name.startswith(start)
        assert name.endswith(end)
        assert len(start) > 10
        assert len(end) > 10
    cut = page.locator(".segment span").evaluate_all(
        "all => all.some(one => one.scrollWidth > one.clientWidth || one.scrollHeight > one.clientHeight)"
    )
    assert not cut


def test_what_is_said_beside_the_bars_is_not_cut(show):
    eight = plan(Strategy.REPLICATE, *(card("t4", LADDER, replica=i, position=i) for i in range(8)), batch=16)
    for value in (single(), split(), eight, infeasible()):
        page = show(value)
        cut = page.locator(".parts .size").evaluate_all("all => all.some(one => one.scrollWidth > one.clientWidth + 1)")
        assert not cut
        heights = boxes(page, ".bar-and-parts")
        assert max(height for *_, height in heights) - min(height for *_, height in heights) < 1


@pytest.mark.parametrize("width", [480, 1000, 2000])
def test_the_page_fits_windows_of_any_width(show, width):
    stages = plan(
        Strategy.SPLIT,
        *(card("rtx2080ti", LADDER[3 * i :][: 3 if i < 6 else 9], stage=i, position=i) for i in range(7)),
    )
    for value in (stages, replicate()):
        page = show(value, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_windows_get_a_dark_page(show):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (show(split(), scheme=scheme).evaluate(ground) for scheme in ("light", "dark"))
    assert light == "rgb(245, 246, 248)"
    assert dark == "rgb(15, 18, 22)"
