// A table whose lines may hold lines: sorted by a click on a heading, filtered by a text, opened and closed.

class TreeTable {
  /**
   * @param table The element.
   * @param columns Of each: `title`, `hint`, `value` (what is sorted by), `cell` (what is shown), whether it is
   *     `text` (and kept `whole`, on one line), and `share` (the length of its bar, in [0, 1]) where it has one.
   *     The first column is indented.
   * @param options `limit`: lines to show at most. `footer`: a line below all. `drawn`: called with how many lines
   *     match, and the text that they match.
   *
   * A line has `key`, `name` (what a filter looks into) and `parts`, the lines inside it.
   */
  constructor(table, columns, { limit = Infinity, footer = null, drawn = () => {} } = {}) {
    Object.assign(this, { table, columns, limit, footer, drawn });
    this.lines = [];
    this.open = new Set();
    this.sorted = null;
    this.wanted = "";
  }

  show(lines) {
    this.lines = lines;
    this.draw();
  }

  filter(text) {
    this.wanted = text.trim().toLowerCase();
    this.draw();
  }

  openAll() {
    const visit = (line) => line.parts.length && this.open.add(line.key) && line.parts.forEach(visit);
    this.lines.forEach(visit);
    this.draw();
  }

  closeAll() {
    this.open.clear();
    this.draw();
  }

  draw() {
    const body = element("tbody");
    const seen = { count: 0, matches: 0 };
    this.#append(body, this.lines, 0, seen);
    const parts = [this.#head(), body];
    if (this.footer) parts.push(element("tfoot", {}, this.#row(this.footer, 0)));
    this.table.replaceChildren(...parts);
    this.drawn(seen.matches, this.wanted);
  }

  #append(body, lines, depth, seen) {
    for (const line of this.#sort(lines)) {
      const hit = this.#matches(line);
      const holdsHit = !hit && this.#holdsMatch(line);
      if (!hit && !holdsHit) continue;
      seen.matches += hit;
      if (seen.count++ < this.limit) body.append(this.#row(line, depth, holdsHit));
      if (holdsHit) this.#append(body, line.parts, depth + 1, seen);
      else if (this.open.has(line.key)) this.#appendAll(body, line.parts, depth + 1, seen);
    }
  }

  /** What is inside a line that matches needs no match of its own. */
  #appendAll(body, lines, depth, seen) {
    for (const line of this.#sort(lines)) {
      if (seen.count++ < this.limit) body.append(this.#row(line, depth));
      if (this.open.has(line.key)) this.#appendAll(body, line.parts, depth + 1, seen);
    }
  }

  #matches(line) {
    return line.name.toLowerCase().includes(this.wanted);
  }

  #holdsMatch(line) {
    return line.parts.some((part) => this.#matches(part) || this.#holdsMatch(part));
  }

  #sort(lines) {
    if (!this.sorted) return lines;
    const { column, sign } = this.sorted;
    const compare = column.text
      ? (one, other) => column.value(one).localeCompare(column.value(other), "en", { numeric: true })
      : (one, other) => column.value(one) - column.value(other);
    return [...lines].sort((one, other) => sign * compare(one, other));
  }

  #head() {
    const row = element("tr");
    for (const column of this.columns) {
      const direction = this.sorted?.column === column ? this.sorted.sign : 0;
      const sort = { "-1": "descending", 0: "none", 1: "ascending" }[direction];
      const button = element("button", { title: column.hint ?? "", onclick: () => this.#sortBy(column) }, column.title);
      const className = column.text ? "text" : "number";
      row.append(element("th", { className, scope: "col", "aria-sort": sort }, button));
    }
    return element("thead", {}, row);
  }

  /** By a column: numbers largest first and names from A, then the other way, then as it was. */
  #sortBy(column) {
    const first = column.text ? 1 : -1;
    if (this.sorted?.column !== column) this.sorted = { column, sign: first };
    else if (this.sorted.sign === first) this.sorted.sign = -first;
    else this.sorted = null;
    this.draw();
    this.table.tHead.rows[0].cells[this.columns.indexOf(column)].firstChild.focus();
  }

  #row(line, depth, forcedOpen = false) {
    const row = element("tr");
    this.columns.forEach((column, order) => {
      const kind = column.text ? `text${column.whole ? " whole" : ""}` : "number";
      const cell = element("td", { className: kind }, column.cell(line));
      if (!order) this.#indent(cell, line, depth, forcedOpen);
      const share = column.share?.(line);
      if (share) {
        const bar = element("span", { className: "bar" });
        bar.style.width = `${100 * share}%`;
        cell.append(bar);
      }
      row.append(cell);
    });
    return row;
  }

  #indent(cell, line, depth, forcedOpen) {
    if (!this.lines.some((one) => one.parts.length)) return;
    cell.style.paddingLeft = `${depth * 18 + 8}px`;
    const isOpen = forcedOpen || this.open.has(line.key);
    if (!line.parts.length) {
      cell.prepend(element("span", { className: "no-fold" }));
      return;
    }
    const label = `${isOpen ? "Close" : "Open"} ${line.name}`;
    const properties = { className: "fold", "aria-expanded": isOpen, "aria-label": label, disabled: forcedOpen };
    const button = element("button", { ...properties, onclick: () => this.#toggle(line) }, isOpen ? "▾" : "▸");
    button.dataset.key = line.key;
    cell.prepend(button);
  }

  #toggle(line) {
    if (!this.open.delete(line.key)) this.open.add(line.key);
    this.draw();
    const folds = [...this.table.querySelectorAll(".fold")];
    folds.find((fold) => fold.dataset.key === line.key)?.focus();
  }
}
