// The memory curve: categories stacked over the instants of a step.
//
// A step has more instants than the picture has pixels, and its peak often stands for one instant alone. So each column
// of pixels shows, and tells, its fullest instant.

class Curve {
  static HEIGHT = 400;
  static MARGIN = { left: 72, right: 14, top: 26, bottom: 40 };
  static LEAST_INSTANTS = 8;

  /**
   * @param place Where to draw.
   * @param profile Categories and the limit.
   * @param describe Nodes of the tooltip of an instant.
   * @param hold Called with the instant that was chosen, or null for the peak.
   * @param zoomed Called with whether less than the whole step is shown.
   */
  constructor(place, profile, { describe, hold, zoomed }) {
    Object.assign(this, { place, profile, describe, hold, zoomed });
    this.width = 0;
    this.cursor = null;
    this.svg = svgElement("svg", { tabindex: 0, role: "slider", "aria-label": "Instant of the step" });
    this.#listen();
    place.replaceChildren(this.svg);
    onWidth(place, (width) => {
      this.width = width;
      this.#draw();
    });
  }

  show(step, held) {
    this.held = held;
    if (this.step === step) return this.#draw();
    this.step = step;
    this.zoom();
  }

  /** Show [left, right) of the instants; the whole step without arguments. */
  zoom(left = this.step.start, right = this.step.end) {
    const { start, end } = this.step;
    const count = Math.min(end - start, Math.max(Curve.LEAST_INSTANTS, Math.round(right - left)));
    this.left = Math.round(Math.min(Math.max(start, left), end - count));
    this.right = this.left + count;
    this.zoomed(count < end - start);
    this.#draw();
  }

  #draw() {
    if (!this.step || !this.width) return;
    const { left, right, top, bottom } = Curve.MARGIN;
    this.plot = { left, top, right: this.width - right, bottom: Curve.HEIGHT - bottom };
    this.highest = 1.16 * this.step.total[this.step.peak];
    const limit = this.profile.limit;
    if (limit && limit.size < 1.5 * this.highest) this.highest = Math.max(this.highest, 1.06 * limit.size);
    this.#cut();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${Curve.HEIGHT}`);
    this.svg.dataset.left = this.left;
    this.svg.dataset.right = this.right;
    this.overlay = svgElement("g");
    this.svg.replaceChildren(
      this.#phases(), this.#areas(), this.#axes(), this.#limit(), this.#marks(), this.overlay,
    );
    this.#drawCursor();
    this.#tell(this.cursor ?? this.held ?? this.step.peak);
  }

  /** Cut what is shown into columns: `edges` bound them, `instants` are the fullest of each. */
  #cut() {
    const count = Math.min(this.right - this.left, Math.round(this.plot.right - this.plot.left));
    const edge = (column) => this.left + Math.floor((column * (this.right - this.left)) / count);
    this.edges = Array.from({ length: count + 1 }, (_, column) => edge(column));
    this.instants = this.edges.slice(0, -1).map((start, column) => this.step.fullest(start, this.edges[column + 1]));
  }

  #x(instant) {
    const share = (instant - this.left) / (this.right - this.left);
    return this.plot.left + share * (this.plot.right - this.plot.left);
  }

  #y(size) {
    return this.plot.bottom - (size / this.highest) * (this.plot.bottom - this.plot.top);
  }

  /** The column at a point; beside the peak, which may be one pixel wide, that of the peak. */
  #column(x) {
    const instantsPerPixel = (this.right - this.left) / (this.plot.right - this.plot.left);
    const { peak } = this.step;
    const isShown = this.left <= peak && peak < this.right;
    if (isShown && instantsPerPixel > 0.25 && Math.abs(x - this.#x(peak + 0.5)) < 4) return this.#columnOf(peak);
    const instant = this.left + Math.floor((x - this.plot.left) * instantsPerPixel);
    return this.#columnOf(Math.min(this.right - 1, Math.max(this.left, instant)));
  }

  #columnOf(instant) {
    return this.edges.findIndex((edge) => edge > instant) - 1;
  }

  #phases() {
    const group = svgElement("g");
    for (const [phase, start, end] of this.step.spans) {
      const [left, right] = [Math.max(start, this.left), Math.min(end, this.right)].map((one) => this.#x(one));
      if (right <= left) continue;
      const { top, bottom } = this.plot;
      const box = { x: left, y: 0, width: right - left, height: bottom };
      group.append(svgElement("rect", { ...box, class: `phase ${phase}` }));
      if (right - left > 9 * phase.length) {
        group.append(svgElement("text", { x: left + 6, y: top - 9, class: "phase-name" }, phase));
      }
    }
    return group;
  }

  /** Each category down to the axis, the top of the stack first: what comes later covers the rest. */
  #areas() {
    const group = svgElement("g", { class: "areas" });
    const below = new Float64Array(this.instants.length);
    this.profile.categories.forEach((category, row) => {
      const values = this.step.stack[row];
      if (!this.instants.some((instant) => values[instant])) return;
      let path = `M${this.plot.left} ${this.plot.bottom}`;
      this.instants.forEach((instant, column) => {
        below[column] += values[instant];
        path += `V${this.#y(below[column]).toFixed(1)}H${this.#x(this.edges[column + 1]).toFixed(1)}`;
      });
      path += `V${this.plot.bottom}Z`;
      group.prepend(svgElement("path", { d: path, fill: category.colour, "data-category": category.name }));
    });
    return group;
  }

  #axes() {
    const group = svgElement("g", { class: "axes" });
    const { left, right, bottom } = this.plot;
    const [unit, unitName] = this.step.total[this.step.peak] >= GIB ? [GIB, "GiB"] : [MIB, "MiB"];
    const step = niceStep(this.highest / unit / 8);
    for (let tick = 0; tick * unit <= this.highest; tick += step) {
      const y = this.#y(tick * unit);
      const label = `${Number(tick.toFixed(6))} ${unitName}`;
      group.append(
        svgElement("line", { x1: left, x2: right, y1: y, y2: y, class: tick ? "grid" : "base" }),
        svgElement("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, label),
      );
    }
    const stride = Math.max(1, niceStep((this.right - this.left) / Math.max(2, this.width / 160)));
    const start = this.step.start;
    for (let tick = Math.ceil((this.left - start) / stride) * stride; tick <= this.right - start; tick += stride) {
      const x = this.#x(tick + start);
      group.append(
        svgElement("line", { x1: x, x2: x, y1: bottom, y2: bottom + 5, class: "base" }),
        svgElement("text", { x, y: bottom + 18, "text-anchor": "middle" }, formatCount(tick)),
      );
    }
    const at = { x: right, y: bottom + 34, "text-anchor": "end" };
    group.append(svgElement("text", at, "allocations and frees of the step, in order"));
    return group;
  }

  #limit() {
    const limit = this.profile.limit;
    const group = svgElement("g", { class: "limit" });
    if (!limit) return group;
    const { left, right, top } = this.plot;
    const peakIsLate = this.step.peak > (this.left + this.right) / 2;
    const side = peakIsLate ? { x: left + 6, "text-anchor": "start" } : { x: right - 6, "text-anchor": "end" };
    const inside = limit.size <= this.highest;
    const y = inside ? this.#y(limit.size) : top;
    if (inside) group.append(svgElement("line", { x1: left, x2: right, y1: y, y2: y }));
    const label = inside ? limit.label : `↑ ${limit.label}`;
    group.append(svgElement("text", { ...side, y: inside ? y - 6 : top + 14 }, label));
    return group;
  }

  /** The peak, and the instant that is held. */
  #marks() {
    const group = svgElement("g", { class: "marks" });
    if (this.held !== null && this.left <= this.held && this.held < this.right) {
      const x = this.#x(this.held + 0.5);
      group.append(svgElement("line", { x1: x, x2: x, y1: this.plot.top, y2: this.plot.bottom, class: "held" }));
    }
    const { peak, total, peakMoment } = this.step;
    if (peak < this.left || this.right <= peak) return group;
    const [x, y] = [this.#x(peak + 0.5), this.#y(total[peak])];
    const label = `${formatBytes(total[peak])}, ${peakMoment}`;
    const late = x > (this.plot.left + this.plot.right) / 2;
    const at = { x: x + (late ? -10 : 10), y: y - 8, "text-anchor": late ? "end" : "start", class: "peak" };
    group.append(
      svgElement("path", { d: `M${x} ${y - 1}l-5 -9h10z`, class: "peak-mark" }),
      svgElement("text", at, label),
    );
    return group;
  }

  #drawCursor() {
    this.overlay.replaceChildren();
    const { top, bottom } = this.plot;
    if (this.drag && this.drag.moved) {
      const [from, to] = [this.drag.from, this.drag.to].sort((one, other) => one - other);
      const box = { x: from, y: top, width: to - from, height: bottom - top };
      this.overlay.append(svgElement("rect", { ...box, class: "selection" }));
    }
    if (this.cursor === null) return;
    const column = this.#columnOf(this.cursor);
    const x = this.#x((this.edges[column] + this.edges[column + 1]) / 2);
    const y = this.#y(this.step.total[this.cursor]);
    this.overlay.append(
      svgElement("line", { x1: x, x2: x, y1: top, y2: bottom, class: "cursor" }),
      svgElement("circle", { cx: x, cy: y, r: 4, class: "cursor" }),
    );
  }

  /** Put the cursor on a column, and its tooltip beside a point of the window. */
  #point(column, x, y) {
    this.cursor = this.instants[column];
    this.#drawCursor();
    this.#tell(this.cursor);
    if (this.drag?.moved) hideTooltip();
    else showTooltip(x, y, ...this.describe(this.step, this.cursor));
  }

  /** Say to who does not see the picture which instant is meant. */
  #tell(instant) {
    const { start, end, total } = this.step;
    const text = `${formatBytes(total[instant])}, ${this.step.phase(instant)}`;
    const told = { valuemin: 0, valuemax: end - start - 1, valuenow: instant - start, valuetext: text };
    for (const [name, value] of Object.entries(told)) this.svg.setAttribute(`aria-${name}`, value);
  }

  #leave() {
    this.cursor = null;
    this.#drawCursor();
    hideTooltip();
  }

  #reset() {
    this.#leave();
    this.zoom();
    this.hold(null);
  }

  #listen() {
    const within = (event) => {
      const box = this.svg.getBoundingClientRect();
      return ((event.clientX - box.left) * this.width) / box.width;
    };
    const listen = (name, act) => this.svg.addEventListener(name, act);
    listen("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.drag = { from: within(event), to: within(event), moved: false };
      this.svg.setPointerCapture(event.pointerId);
    });
    listen("pointermove", (event) => {
      if (this.drag) {
        this.drag.to = Math.min(this.plot.right, Math.max(this.plot.left, within(event)));
        this.drag.moved ||= Math.abs(this.drag.to - this.drag.from) > 5;
      }
      this.#point(this.#column(within(event)), event.clientX, event.clientY);
    });
    listen("pointerup", () => {
      const { drag } = this;
      this.drag = null;
      if (!drag) return;
      const [first, last] = [drag.from, drag.to].map((x) => this.#column(x)).sort((one, other) => one - other);
      if (drag.moved) this.zoom(this.edges[first], this.edges[last + 1]);
      else this.hold(this.instants[first]);
    });
    listen("pointercancel", () => (this.drag = null));
    listen("pointerleave", () => this.drag || this.#leave());
    listen("dblclick", () => this.#reset());
    listen("blur", () => this.#leave());
    listen("keydown", (event) => this.#press(event));
  }

  #press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const cursor = this.cursor ?? this.held ?? this.step.peak;
    const column = this.#columnOf(Math.min(this.right - 1, Math.max(this.left, cursor)));
    const stride = event.shiftKey ? 20 : 1;
    const span = this.right - this.left;
    const middle = this.instants[column];
    const moves = { ArrowLeft: column - stride, ArrowRight: column + stride, Home: 0, End: Infinity };
    const zooms = { "+": span / 2, "=": span / 2, "-": span * 2 };
    if (event.key in moves) {
      this.#pointByKey(Math.min(this.instants.length - 1, Math.max(0, moves[event.key])));
    } else if (event.key in zooms) {
      const count = zooms[event.key];
      this.zoom(middle - count / 2, middle + count / 2);
      this.#pointByKey(this.#columnOf(middle));
    } else if (event.key === "Enter") {
      this.hold(middle);
    } else if (event.key === "Escape") {
      this.#reset();
    } else return;
    event.preventDefault();
  }

  #pointByKey(column) {
    const box = this.svg.getBoundingClientRect();
    this.#point(column, box.left + (this.#x(this.edges[column]) * box.width) / this.width, box.top + this.plot.top);
  }
}

/** 1, 2 or 5 times a power of ten, not less than a number. */
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least * 0.999);
}
