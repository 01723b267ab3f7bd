// The page of a plan: what was embedded is drawn once; tables sort themselves.

const plan = JSON.parse(byId("plan").textContent);

function showHeader() {
  byId("headline").textContent = plan.headline;
  byId("settings").textContent = plan.settings;
  byId("notes").textContent = plan.notes;
  const verdict = byId("verdict");
  verdict.className = plan.verdict.fits ? "fits" : "too-much";
  verdict.append(...plan.verdict.lines.map((line) => element("p", {}, line)));
  byId("figures").append(
    ...plan.figures.map(({ name, value, note }) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value), element("dd", { className: "note" }, note)),
    ),
  );
}

function showLevels() {
  const used = new Set(plan.cards.flatMap((card) => card.segments.map((segment) => segment.level)));
  const entries = plan.levels
    .filter((level) => used.has(level.name))
    .map((level) => element("li", {}, swatch(level), `${level.name}: ${level.words}`));
  if (plan.splits) entries.push(element("li", {}, "→ maps to the next card, their gradients back"));
  byId("levels").append(...entries);
}

function words(title, key, { hint = "", whole = false } = {}) {
  return { title, hint, text: true, whole, value: (line) => line[key], cell: (line) => line[key] };
}

function figure(title, key, format, { hint = "", share } = {}) {
  return { title, hint, value: (line) => line[key], cell: (line) => format(line[key]), share };
}

function several(key) {
  return new Set(plan.cards.map((card) => card[key])).size > 1;
}

const fromOne = (number) => String(number + 1);
const noDigits = digits(0);
const percent = (share) => `${noDigits(100 * share)} %`;
const capped = (share) => Math.min(1, share);

function cardColumns() {
  return [
    words("card", "name"),
    ...(several("node") ? [figure("node", "node", String)] : []),
    ...(several("replica") ? [figure("replica", "replica", fromOne)] : []),
    ...(several("stage") ? [figure("stage", "stage", fromOne)] : []),
    figure("images", "images", formatCount, { hint: "Of each pass that go through it" }),
    figure("segments", "count", formatCount),
    figure("compute", "seconds", formatSeconds, { hint: "Of each pass" }),
    figure("peak", "peak", formatBytes, { hint: "What torch's allocator will have handed out at once" }),
    figure("outside", "outside", formatBytes, { hint: "What the process takes beside the allocator" }),
    figure("available", "available", formatBytes, { hint: "Capacity less the reserve" }),
    figure("filled", "filled", percent, { hint: "Needed of available", share: (line) => capped(line.filled) }),
    words("peak at", "peakMoment"),
  ];
}

function alternativeColumns() {
  return [
    words("strategy", "strategy", { whole: true }),
    words("cards (images)", "cards", { hint: "With the images of each pass that go through each" }),
    words("stages begin at", "starts", { hint: "The first segment of each stage" }),
    words("micro-batches", "flow", { hint: "And their schedule" }),
    figure("images/s", "rate", twoDigits),
    figure("step", "seconds", formatSeconds),
    figure("fullest card", "fullest", percent, {
      hint: "Needed of available, on the fullest card",
      share: (line) => capped(line.fullest),
    }),
  ];
}

/** A table of lines without parts. */
function showTable(id, columns, lines) {
  const table = new TreeTable(byId(id), columns);
  table.show(lines.map((line, key) => ({ name: "", ...line, key, parts: [] })));
}

function download() {
  const link = element("a", { download: "plan.json" });
  link.href = URL.createObjectURL(new Blob([plan.json, "\n"], { type: "application/json" }));
  link.click();
  URL.revokeObjectURL(link.href);
}

showHeader();
showLevels();
drawPlacement(byId("placement"), plan.cards, plan.segments, plan.levels);
showTable(
  "cards",
  cardColumns(),
  plan.cards.map((card) => ({ ...card, count: card.segments.length, filled: card.needed / Math.max(1, card.available) })),
);
byId("alternatives-section").hidden = !plan.alternatives.length;
showTable("alternatives", alternativeColumns(), plan.alternatives);
byId("json").textContent = plan.json;
byId("download").addEventListener("click", download);
addEventListener("scroll", hideTooltip, { passive: true });
