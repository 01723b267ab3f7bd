// The page: what was embedded is decoded, drawn, and redrawn where a step or an instant is chosen.

const profile = JSON.parse(byId("profile").textContent);
const steps = profile.steps.map((raw) => new Step(raw, profile.kinds, profile.categories.length));
const state = { step: steps[profile.largestStep], held: null };

/** The layer that made an allocation; "" where it was not computed. */
function layerOf(step, index) {
  return profile.layers[step.get(index, "layer")] || (categoryOf(step, index).isComputed ? profile.modelItself : "");
}

function operationOf(step, index) {
  return profile.operations[step.get(index, "operation")].replace(/^aten\./, "");
}

/** The layer and operation of an allocation, in words. */
function maker(step, index) {
  return [layerOf(step, index), operationOf(step, index)].filter(Boolean).join(" · ") || "–";
}

function tensorText(step, index) {
  return profile.tensors[step.get(index, "tensor")];
}

/** What reads an allocation last, in words. */
function waitsFor(step, index) {
  const phase = step.get(index, "reader_phase");
  if (phase < 0) return "";
  return `${profile.phases[phase]} of ${profile.layers[step.get(index, "reader_layer")] || "the step"}`;
}

function rebuiltAt(step, index) {
  return profile.levels[step.get(index, "level")] ?? "";
}

function categoryOf(step, index) {
  return profile.categories[step.get(index, "category")];
}

function describeInstant(step, instant) {
  const nodes = [
    element("strong", {}, formatBytes(step.total[instant])),
    element("div", {}, `${step.phase(instant)}, instant ${formatCount(instant - step.start)}`),
  ];
  const index = step.event[instant];
  if (index >= 0) {
    const verb = step.born[index] === instant ? "allocates" : "frees";
    const text = `${verb} ${formatBytes(step.get(index, "size"))}: ${maker(step, index)}`;
    nodes.push(element("div", { className: "event" }, text));
  }
  const alive = step.alive(instant);
  const rows = alive.slice(0, 6).map((one) => {
    const category = categoryOf(step, one);
    const size = element("td", { className: "number" }, formatBytes(step.get(one, "size")));
    const what = element("small", {}, `${category.name} ${tensorText(step, one)}`);
    return element("tr", {}, element("td", {}, swatch(category)), size, element("td", {}, maker(step, one), what));
  });
  nodes.push(element("table", { className: "largest" }, ...rows));
  const others = alive.length - rows.length;
  if (others) nodes.push(element("small", {}, `and ${formatCount(others)} more`));
  return nodes;
}

function describeAllocation(step, index, whole) {
  const size = step.get(index, "size");
  const facts = [
    ["category", categoryOf(step, index).name],
    ["made by", maker(step, index)],
    ["tensor", tensorText(step, index)],
    ["waits for", waitsFor(step, index)],
    ["rebuilt at", rebuiltAt(step, index)],
  ];
  const rows = facts
    .filter(([, text]) => text)
    .map(([name, text]) => element("tr", {}, element("th", {}, name), element("td", {}, text)));
  return [element("strong", {}, `${formatBytes(size)}, ${formatShare(size, whole)}`), element("table", {}, ...rows)];
}

function showHeader() {
  byId("headline").textContent = profile.headline;
  byId("notes").textContent = profile.notes;
  const verdict = byId("verdict");
  verdict.hidden = !profile.verdict;
  if (profile.verdict) {
    verdict.className = profile.verdict.fits ? "fits" : "too-much";
    verdict.textContent = profile.verdict.text;
  }
  byId("figures").append(
    ...profile.figures.map(({ name, value, note }) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value), element("dd", { className: "note" }, note)),
    ),
  );
}

function showCategories(step, instant) {
  const whole = step.total[instant];
  const sizes = profile.categories.map((category, row) => ({ category, size: step.stack[row][instant] }));
  const rows = sizes
    .filter(({ size }) => size)
    .reverse()
    .map(({ category, size }) => {
      const bar = element("span", { className: "bar" });
      bar.style.width = `${(100 * size) / whole}%`;
      bar.style.backgroundColor = category.colour;
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, swatch(category), category.name, bar),
        element("td", { className: "number" }, formatBytes(size)),
        element("td", { className: "number" }, formatShare(size, whole)),
      );
    });
  const total = [element("th", { scope: "row" }, "all"), element("td", {}, formatBytes(whole)), element("td")];
  const foot = element("tfoot", {}, element("tr", {}, ...total));
  byId("categories").replaceChildren(element("tbody", {}, ...rows), foot);
}

function aliveLines(step, instant) {
  return step.alive(instant).map((index) => {
    const line = {
      key: index,
      parts: [],
      size: step.get(index, "size"),
      category: categoryOf(step, index),
      layer: layerOf(step, index),
      operation: operationOf(step, index),
      tensor: tensorText(step, index),
      waits: waitsFor(step, index),
      level: rebuiltAt(step, index),
    };
    line.name = [line.category.name, line.layer, line.operation, line.tensor, line.waits, line.level].join(" ");
    return line;
  });
}

const ALIVE_LINES = 40;

function aliveTable() {
  const text = (title, hint, key) => {
    const value = (line) => line[key];
    return { title, hint, text: true, value, cell: value };
  };
  const columns = [
    {
      title: "size",
      hint: "Bytes, without the allocator's rounding",
      value: (line) => line.size,
      cell: (line) => formatBytes(line.size),
      share: (line) => line.size / table.lines[0].size,
    },
    {
      ...text("category", "What it is for"),
      whole: true,
      value: (line) => line.category.name,
      cell: (line) => element("span", {}, swatch(line.category), line.category.name),
    },
    text("made by", "The layer that made it", "layer"),
    { ...text("operation", "The operator that made it", "operation"), whole: true },
    { ...text("tensor", "Type and shape", "tensor"), whole: true },
    text("waits for", "The phase and layer of the operation that reads it last", "waits"),
    text("rebuilt at", "The lowest recompute level of its segment at which it would not be kept", "level"),
  ];
  const all = byId("alive-all");
  const table = new TreeTable(byId("alive"), columns, {
    limit: ALIVE_LINES,
    drawn: (matches) => {
      all.hidden = matches <= table.limit;
      all.textContent = `Show all ${formatCount(matches)}`;
    },
  });
  all.addEventListener("click", () => {
    table.limit = Infinity;
    table.draw();
  });
  byId("alive-filter").addEventListener("input", (event) => table.filter(event.target.value));
  return table;
}

function showSteps() {
  const choice = byId("steps");
  choice.hidden = steps.length < 2;
  choice.replaceChildren(
    ...steps.map((step) => {
      const choose = () => update({ step, held: null });
      return element("button", { "aria-pressed": step === state.step, onclick: choose }, step.name);
    }),
  );
}

function update(change) {
  Object.assign(state, change);
  const { step, held } = state;
  const instant = held ?? step.peak;
  const isPeak = held === null;
  const number = formatCount(instant - step.start);
  const when = isPeak ? `the peak, ${step.peakMoment}` : `instant ${number}, ${step.phase(instant)}`;
  const moment = `${formatBytes(step.total[instant])} at ${when}`;
  for (const place of document.querySelectorAll(".moment")) place.textContent = moment;
  for (const button of document.querySelectorAll(".back-to-peak")) button.hidden = isPeak;
  byId("categories-title").textContent = isPeak ? "Of the peak by category" : `At ${when}`;
  byId("alive-title").textContent = isPeak ? "What is alive at the worst moment" : "What is alive then";
  const focused = [...byId("steps").children].indexOf(document.activeElement);
  showSteps();
  byId("steps").children[focused]?.focus();
  curve.show(step, held);
  showCategories(step, instant);
  treemap.show(step, instant);
  alive.show(aliveLines(step, instant));
}

const curve = new Curve(byId("curve"), profile, {
  describe: describeInstant,
  hold: (held) => update({ held }),
  zoomed: (isZoomed) => (byId("whole-step").hidden = !isZoomed),
});
const treemap = new Treemap(byId("treemap"), byId("path"), profile.model, {
  layer: (step, index) => layerOf(step, index) || `(${categoryOf(step, index).name})`,
  category: categoryOf,
  label: (step, index) => operationOf(step, index) || categoryOf(step, index).name,
  describe: describeAllocation,
});
const alive = aliveTable();
const layers = layerTree(profile.rows);
const layersTable = layerTable(byId("layers"), layers, (matches, wanted) => {
  byId("layers-count").textContent = wanted ? `${formatCount(matches)} found` : "";
});

byId("whole-step").addEventListener("click", () => curve.zoom());
byId("expand-all").addEventListener("click", () => layersTable.openAll());
byId("collapse-all").addEventListener("click", () => layersTable.closeAll());
byId("layers-filter").addEventListener("input", (event) => layersTable.filter(event.target.value));
for (const button of document.querySelectorAll(".back-to-peak")) {
  button.addEventListener("click", () => update({ held: null }));
}
addEventListener("scroll", hideTooltip, { passive: true });

showHeader();
update({});
layersTable.show(layers.parts);
