// Elements of the page. Names of layers may be anything, so text is only ever set as text, never as markup.

/** An element with properties and children; a child is a node or a text, and null is none. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svgElement(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function swatch(category) {
  const made = element("span", { className: "swatch" });
  made.style.backgroundColor = category.colour;
  return made;
}

/** Calls back with the width of an element, now and whenever it changes. */
function onWidth(target, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(target.clientWidth);
    if (width && width !== last) draw((last = width));
  }).observe(target);
}

/** Shows nodes beside a point of the window, on the side where there is room. */
function showTooltip(x, y, ...nodes) {
  const tooltip = byId("tooltip");
  tooltip.replaceChildren(...nodes);
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  const top = y + 16 + height > innerHeight ? y - 16 - height : y + 16;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

function hideTooltip() {
  byId("tooltip").hidden = true;
}
