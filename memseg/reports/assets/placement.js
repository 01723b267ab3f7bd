// What sits where: a column for each card, its segments at their place in the model, so that a split is a staircase.
//
// The memory of a card is below its segments; with one or two cards beside them, where there is room.

const LANE_GAP = 36;
const ROW_HEIGHT = 27;
const LETTER = 7.3;
const MOST_BESIDE = 2;

/**
 * @param place Where to draw.
 * @param cards Of the plan, replica by replica.
 * @param names Of all segments, in the order of the model.
 * @param levels Recompute levels: name, words, colour, ink.
 */
function drawPlacement(place, cards, names, levels) {
  const rowOf = new Map(names.map((name, row) => [name, row]));
  const levelOf = new Map(levels.map((level) => [level.name, level]));
  const most = Math.max(1, ...cards.map((card) => Math.max(card.capacity, card.needed)));
  const isBeside = cards.length <= MOST_BESIDE;
  const barHeight = isBeside ? Math.max(LEAST_BAR_HEIGHT, ROW_HEIGHT * names.length - 40) : LEAST_BAR_HEIGHT;
  const widest = Math.min(400, Math.max(270, 22 + LETTER * Math.max(...names.map((name) => name.length))));
  for (const stages of byReplica(cards)) {
    const group = element("div", { className: "replica", role: "group" });
    if (stages[0].replicaWords) group.append(element("h3", {}, stages[0].replicaWords));
    const columns = element("div", { className: "columns" });
    // Row by row, so that the lanes of a replica begin and end at the same height.
    const [lanes, bars] = [widest, 270].map((width) => `repeat(${stages.length}, minmax(168px, ${width}px))`);
    columns.style.gridTemplateColumns = isBeside ? `${lanes} ${bars}` : lanes;
    columns.style.columnGap = `${LANE_GAP}px`;
    stages.forEach((card, stage) => {
      const put = (made, row, column) => {
        made.style.gridRow = row;
        made.style.gridColumn = column + 1;
        columns.append(made);
      };
      put(cardHead(card), 1, stage);
      put(lane(card, rowOf, levelOf), 2, stage);
      const memory = memoryOf(card, barHeight / most, barHeight);
      if (isBeside) put(memory, "1 / span 2", stages.length + stage);
      else put(memory, 3, stage);
    });
    group.append(columns);
    place.append(group);
  }
  listenToLanes(place);
  onWidth(place, () => place.querySelectorAll(".segment").forEach(fitName));
}

/** A long name gets two small lines; what does not fit there is shortened in the middle, for both ends tell things. */
function fitName(block) {
  const [name, shown] = [block.dataset.name, block.firstChild];
  shown.textContent = name;
  block.classList.remove("long");
  if (shown.scrollWidth <= shown.clientWidth) return;
  block.classList.add("long");
  let kept = Math.min(name.length, Math.ceil((name.length * shown.clientHeight) / shown.scrollHeight) + 8);
  for (; kept > 2 && shown.scrollHeight > shown.clientHeight; kept--) {
    const start = Math.floor(kept / 2);
    shown.textContent = `${name.slice(0, start)}…${name.slice(start - kept)}`;
  }
}

function byReplica(cards) {
  const found = [];
  for (const card of cards) (found[card.replica] ??= []).push(card);
  return found;
}

function cardHead(card) {
  const work = `${card.shareWords}, ${formatSeconds(card.seconds)} a pass`;
  const lines = [card.placeWords, work].filter(Boolean).map((words) => element("small", {}, words));
  return element("div", { className: "card-head" }, element("strong", {}, card.name), ...lines);
}

function lane(card, rowOf, levelOf) {
  const made = element("div", { className: "lane", role: "group", "aria-label": `Segments of ${card.name}` });
  made.style.gridTemplateRows = `repeat(${rowOf.size}, ${ROW_HEIGHT}px)`;
  if (card.stage) made.append(crossing(rowOf.get(card.segments[0].name)));
  card.segments.forEach((segment, index) => {
    const level = levelOf.get(segment.level);
    const label = `${segment.name}, ${level.name}: ${level.words}`;
    const block = element("div", { className: "segment", tabIndex: index ? -1 : 0, "aria-label": label, role: "img" });
    block.append(element("span", {}, segment.name));
    block.dataset.name = segment.name;
    block.dataset.level = level.name;
    block.style.gridRow = rowOf.get(segment.name) + 1;
    block.style.backgroundColor = level.colour;
    block.style.color = level.ink;
    const position = `${rowOf.get(segment.name) + 1} of ${rowOf.size}`;
    tellOf(block, () => describeSegment(card, segment, level, position));
    made.append(block);
  });
  return made;
}

/** An arrow from the last segment of the card before, at the left and one row higher. */
function crossing(row) {
  const [width, down] = [LANE_GAP + 24, ROW_HEIGHT / 2 + 1];
  const made = svgElement(
    "svg",
    { class: "crossing", width, height: ROW_HEIGHT, "aria-hidden": "true" },
    svgElement("path", { d: `M1 ${ROW_HEIGHT / 2}H${width - 8}v${down - 8}`, class: "shaft" }),
    svgElement("path", { d: `M${width - 13} ${ROW_HEIGHT - 9}h10l-5 9z`, class: "point" }),
  );
  made.style.left = `${-LANE_GAP}px`;
  made.style.top = `${(row - 1) * ROW_HEIGHT}px`;
  return made;
}

function describeSegment(card, segment, level, position) {
  return [
    element("strong", {}, segment.name),
    factTable([
      ["level", `${level.name}: ${level.words}`],
      ["card", card.name],
      ["place", [card.replicaWords, card.placeWords].filter(Boolean).join(", ")],
      ["segment", `${position} of the model`],
    ]),
  ];
}

function factTable(facts) {
  const rows = facts
    .filter(([, words]) => words)
    .map(([name, words]) => element("tr", {}, element("th", {}, name), element("td", {}, words)));
  return element("table", {}, ...rows);
}

/** Show a tooltip of an element where it is pointed at or has the focus. */
function tellOf(target, describe) {
  target.addEventListener("pointermove", (event) => showTooltip(event.clientX, event.clientY, ...describe()));
  target.addEventListener("pointerleave", hideTooltip);
  target.addEventListener("focus", () => {
    const box = target.getBoundingClientRect();
    showTooltip(box.left + box.width / 2, box.top + box.height / 2, ...describe());
  });
  target.addEventListener("blur", hideTooltip);
}

/** What is pointed at is marked in every replica; arrows go from segment to segment. */
function listenToLanes(place) {
  const blocks = [...place.querySelectorAll(".segment")];
  const mark = (name) => blocks.forEach((block) => block.classList.toggle("same", block.dataset.name === name));
  for (const block of blocks) {
    for (const start of ["pointerenter", "focus"]) block.addEventListener(start, () => mark(block.dataset.name));
    for (const end of ["pointerleave", "blur"]) block.addEventListener(end, () => mark(null));
  }
  place.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step || !event.target.classList.contains("segment")) return;
    const inLane = [...event.target.parentNode.querySelectorAll(".segment")];
    inLane[inLane.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  });
}
