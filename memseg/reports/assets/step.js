// One step: its allocations in columns, and how much is allocated at each instant.

class Step {
  /**
   * @param raw As page.py embeds it: of each allocation its kind, its birth as the distance from the one before, and
   *     how long it lives.
   * @param kinds Columns of what allocations can have in common: size, category, layer, ...
   * @param categories How many there are.
   */
  constructor(raw, kinds, categories) {
    Object.assign(this, { name: raw.name, spans: raw.spans, peak: raw.peak, peakMoment: raw.peakMoment });
    this.start = raw.spans[0][1];
    this.end = raw.spans.at(-1)[2];
    this.kinds = kinds;
    this.kind = raw.kind;
    this.born = Int32Array.from(raw.born);
    for (let index = 1; index < this.born.length; index++) this.born[index] += this.born[index - 1];
    this.died = this.born.map((born, index) => born + raw.life[index]);
    this.stack = Array.from({ length: categories }, () => new Float64Array(raw.instants));
    this.total = new Float64Array(raw.instants);
    /** Of each instant, the allocation that begins or ends there; -1 where none does. */
    this.event = new Int32Array(raw.instants).fill(-1);
    this.#sum(raw.instants);
    const size = (index) => this.get(index, "size");
    this.largestFirst = [...this.kind.keys()].filter(size).sort((one, other) => size(other) - size(one));
  }

  #sum(instants) {
    this.kind.forEach((kind, index) => {
      const row = this.stack[this.kinds.category[kind]];
      const [born, died] = [this.born[index], this.died[index]];
      row[born] += this.kinds.size[kind];
      this.event[born] = index;
      if (died < instants) {
        row[died] -= this.kinds.size[kind];
        this.event[died] = index;
      }
    });
    for (const row of this.stack) {
      for (let instant = 0; instant < instants; instant++) {
        if (instant) row[instant] += row[instant - 1];
        this.total[instant] += row[instant];
      }
    }
  }

  /** What is told of an allocation. */
  get(index, name) {
    return this.kinds[name][this.kind[index]];
  }

  /** Indices of what is allocated after an instant, largest first. */
  alive(instant) {
    return this.largestFirst.filter((index) => this.born[index] <= instant && instant < this.died[index]);
  }

  /** The instant of [left, right) at which most is allocated. */
  fullest(left, right) {
    let found = left;
    for (let instant = left + 1; instant < right; instant++) {
      if (this.total[instant] > this.total[found]) found = instant;
    }
    return found;
  }

  phase(instant) {
    return (this.spans.find(([, left, right]) => left <= instant && instant < right) ?? ["setup"])[0];
  }
}
