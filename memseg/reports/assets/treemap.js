// What is alive at an instant as nested areas: layers inside layers, and in them tensors, coloured by category.
//
// Nothing is kept free for borders or headings, so areas are proportional to sizes; labels lie on top.

class Treemap {
  static HEIGHT = 460;
  static LEAST_AREA = 4;

  /**
   * @param place Where to draw.
   * @param path Where to say which layer is shown.
   * @param model Its name.
   * @param tell Of an allocation of a step: its `layer`, or a stand-in; its `category`; its `label`; and `describe`,
   *     the nodes of its tooltip.
   */
  constructor(place, path, model, tell) {
    Object.assign(this, { place, path, model, tell });
    this.shown = [];
    this.width = 0;
    place.addEventListener("pointerleave", hideTooltip);
    onWidth(place, (width) => {
      this.width = width;
      this.#draw();
    });
  }

  show(step, instant) {
    this.step = step;
    this.root = this.#tree(step.alive(instant));
    this.#draw();
  }

  /** Layers by their names, with sums. */
  #tree(alive) {
    const node = (label) => ({ label, size: 0, parts: new Map() });
    const root = node(this.model);
    for (const index of alive) {
      const size = this.step.get(index, "size");
      let holder = root;
      holder.size += size;
      for (const label of this.tell.layer(this.step, index).split(".")) {
        if (!holder.parts.has(label)) holder.parts.set(label, node(label));
        holder = holder.parts.get(label);
        holder.size += size;
      }
      holder.parts.set(index, { label: "", size, index });
    }
    return root;
  }

  #draw() {
    if (!this.root || !this.width) return;
    const trail = [this.root];
    for (const label of this.shown) {
      const next = trail.at(-1).parts.get(label);
      if (!next) break;
      trail.push(next);
    }
    this.shown = trail.slice(1).map((node) => node.label);
    this.#drawPath(trail);
    this.place.replaceChildren(...this.#boxes(trail.at(-1), this.width, Treemap.HEIGHT, 0));
  }

  #drawPath(trail) {
    const steps = trail.map((node, depth) => {
      const text = `${node.label} ${formatBytes(node.size)}`;
      if (depth === trail.length - 1) return element("span", { "aria-current": "true" }, text);
      return element("button", { onclick: () => this.#go(this.shown.slice(0, depth)) }, text);
    });
    this.path.replaceChildren(...steps.flatMap((step, depth) => (depth ? [" › ", step] : [step])));
  }

  #go(shown) {
    this.shown = shown;
    hideTooltip();
    this.#draw();
    // The keyboard stays in the picture.
    this.place.querySelector("[tabindex]")?.focus({ preventScroll: true });
  }

  /** Elements for the parts of a node, whose area is width x height. */
  #boxes(node, width, height, depth) {
    const parts = [...node.parts.values()].sort((one, other) => other.size - one.size);
    const boxes = squarify(parts.map((part) => part.size), width, height);
    return parts.flatMap((part, order) => {
      const box = boxes[order];
      if (box.width * box.height < Treemap.LEAST_AREA) return [];
      const made = part.parts ? this.#group(part, box, depth) : this.#tensor(part, box);
      Object.assign(made.style, {
        left: `${(100 * box.x) / width}%`,
        top: `${(100 * box.y) / height}%`,
        width: `${(100 * box.width) / width}%`,
        height: `${(100 * box.height) / height}%`,
      });
      return [made];
    });
  }

  #group(part, box, depth) {
    const made = element("div", { className: `group depth-${Math.min(depth, 3)}` });
    made.append(...this.#boxes(part, box.width, box.height, depth + 1));
    if (depth) return made;
    made.dataset.layer = part.label;
    made.dataset.bytes = part.size;
    const size = `${formatBytes(part.size)}, ${formatShare(part.size, this.root.size)}`;
    if (box.width > 48 && box.height > 30) {
      const roomy = box.width > 60 + 8 * (part.label.length + size.length);
      const name = endOf(part.label, box.width - 26);
      made.append(element("span", { className: "label" }, name, roomy ? element("small", {}, size) : null));
    }
    const enter = () => this.#go([...this.shown, part.label]);
    made.tabIndex = 0;
    made.setAttribute("role", "button");
    made.setAttribute("aria-label", `${part.label}, ${size}`);
    made.addEventListener("click", enter);
    made.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      enter();
    });
    return made;
  }

  #tensor(part, box) {
    const category = this.tell.category(this.step, part.index);
    const made = element("div", { className: "tensor" });
    made.style.backgroundColor = category.colour;
    made.style.color = category.ink;
    made.dataset.bytes = part.size;
    if (box.width > 84 && box.height > 76) {
      const label = this.tell.label(this.step, part.index);
      made.append(element("span", { className: "what" }, label), element("small", {}, formatBytes(part.size)));
    }
    made.addEventListener("pointermove", (event) => {
      showTooltip(event.clientX, event.clientY, ...this.tell.describe(this.step, part.index, this.root.size));
    });
    return made;
  }
}

/**
 * Rectangles with areas in proportion to sizes, as nearly square as can be.
 *
 * Source: Bruls, Huizing, van Wijk, "Squarified Treemaps", 2000.
 *
 * @param sizes Above zero, largest first.
 */
function squarify(sizes, width, height) {
  const boxes = [];
  let [x, y, rest] = [0, 0, sizes.reduce((sum, size) => sum + size, 0)];
  while (boxes.length < sizes.length) {
    const [side, scale] = [Math.min(width, height), (width * height) / rest];
    const first = boxes.length;
    let [count, sum, worst] = [0, 0, Infinity];
    while (first + count < sizes.length) {
      const wider = sum + sizes[first + count];
      const thickness = (wider * scale) / side;
      const [longest, shortest] = [sizes[first], sizes[first + count]].map((size) => (size / wider) * side);
      const ratio = Math.max(longest / thickness, thickness / shortest);
      if (ratio > worst) break;
      [count, sum, worst] = [count + 1, wider, ratio];
    }
    const thickness = (sum * scale) / side;
    let along = 0;
    for (const size of sizes.slice(first, first + count)) {
      const length = (size / sum) * side;
      const upright = width >= height;
      boxes.push(
        upright
          ? { x, y: y + along, width: thickness, height: length }
          : { x: x + along, y, width: length, height: thickness },
      );
      along += length;
    }
    if (width >= height) [x, width] = [x + thickness, width - thickness];
    else [y, height] = [y + thickness, height - thickness];
    rest -= sum;
  }
  return boxes;
}

/** A text, or as much of its end as there is room for; names of layers differ at their ends. */
function endOf(text, width) {
  const letters = Math.max(2, Math.floor(width / 8));
  return text.length <= letters ? text : `…${text.slice(1 - letters)}`;
}
