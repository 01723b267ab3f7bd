// The memory of a card: a bar to the scale of all cards, and beside it what its parts are.

const LEAST_BAR_HEIGHT = 300;

/**
 * @param card Whose memory it is.
 * @param scale Pixels of a byte.
 * @param barHeight Of the highest bar of all.
 */
function memoryOf(card, scale, barHeight) {
  const height = (size) => scale * size;
  const bar = element("div", { className: "memory-bar", "aria-hidden": "true" });
  bar.style.height = `${barHeight}px`;
  const lines = [];
  for (const part of card.parts) {
    const block = element("div", { className: `part ${part.kind}` });
    block.style.height = `${height(part.size)}px`;
    block.style.bottom = `${height(part.start)}px`;
    block.style.backgroundColor = part.colour;
    const line = partLine(part);
    for (const one of [block, line]) {
      one.dataset.part = part.name;
      one.dataset.bytes = part.size;
      tellOf(one, () => describePart(card, part));
      one.addEventListener("pointerenter", () => [block, line].forEach((other) => other.classList.add("meant")));
      one.addEventListener("pointerleave", () => [block, line].forEach((other) => other.classList.remove("meant")));
    }
    bar.append(block);
    lines.unshift(line);
  }
  const capacity = element("div", { className: "capacity" });
  capacity.style.height = `${height(card.capacity)}px`;
  bar.append(capacity);
  const short = card.needed - card.available;
  if (short > 0) {
    const frame = element("div", { className: "short" });
    frame.style.bottom = `${height(card.available)}px`;
    frame.style.height = `${height(short)}px`;
    bar.append(frame);
    lines.unshift(element("li", { className: "too-much" }, `${formatBytes(short)} short`));
  }
  const list = element("ul", { className: "parts", "aria-label": `Memory of ${card.name}` }, ...lines);
  const fill = element("p", { className: `fill ${short > 0 ? "too-much" : ""}` }, card.fillWords);
  const when = element("small", {}, `${formatBytes(card.peak)} at ${card.peakMoment}`);
  return element("div", { className: "memory" }, element("div", { className: "bar-and-parts" }, bar, list), fill, when);
}

function partLine(part) {
  const mark = swatch(part);
  mark.classList.add(part.kind);
  return element("li", {}, mark, element("span", { className: "size" }, part.label), element("span", {}, part.name));
}

function describePart(card, part) {
  return [
    element("strong", {}, `${part.name}: ${part.label}`),
    factTable([
      ["bytes", formatCount(part.size)],
      ["of the card", formatShare(part.size, card.capacity)],
      ["card", card.name],
      ["when", part.kind === "peak" ? `at the peak, ${card.peakMoment}` : ""],
    ]),
  ];
}
