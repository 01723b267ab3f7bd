// The table of layers: the rows of the profile as a tree, where a layer with parts has their total.

const SUMS = ["saved", "parameter", "forward", "backward", "flops"];

/** Lines of a TreeTable; what a layer with parts has of its own becomes a line "(itself)" among them. */
function layerTree(rows) {
  const root = { key: "", name: "", label: "all", parts: [], inside: new Map() };
  const lines = rows.name.map((name, index) => {
    const figures = Object.fromEntries([...SUMS, "peak"].map((column) => [column, rows[column][index]]));
    return { key: name, name, label: name.split(".").at(-1), parts: [], inside: new Map(), ...figures };
  });
  for (const line of lines) {
    let holder = root;
    const labels = line.name.split(".");
    labels.slice(0, -1).forEach((label, depth) => {
      if (!holder.inside.has(label)) {
        const name = labels.slice(0, depth + 1).join(".");
        addLine(holder, { key: name, name, label, parts: [], inside: new Map() });
      }
      holder = holder.inside.get(label);
    });
    const known = holder.inside.get(line.label);
    if (known) addItself(known, line);
    else addLine(holder, line);
  }
  sumUp(root);
  return root;
}

function addLine(holder, line) {
  if (holder.saved !== undefined) {
    const own = { ...holder, parts: [], inside: new Map() };
    for (const column of [...SUMS, "peak"]) delete holder[column];
    addItself(holder, own);
  }
  holder.inside.set(line.label, line);
  holder.parts.push(line);
}

function addItself(holder, line) {
  holder.parts.push({ ...line, key: `${holder.key}.`, label: "(itself)" });
}

function sumUp(line) {
  if (!line.parts.length) return;
  line.parts.forEach(sumUp);
  for (const column of SUMS) line[column] = line.parts.reduce((sum, part) => sum + part[column], 0);
  line.peak = Math.max(...line.parts.map((part) => part.peak));
}

function layerTable(table, root, count) {
  const bytes = (key, title, hint) => ({
    title,
    hint,
    value: (line) => line[key],
    cell: (line) => (line[key] ? formatBytes(line[key]) : "–"),
    share: (line) => line[key] / Math.max(1, root[key]),
  });
  const seconds = (key, title, hint) => ({
    ...bytes(key, title, hint),
    cell: (line) => (line[key] ? formatSeconds(line[key]) : "–"),
    share: (line) => line[key] / (root[key] || 1),
  });
  const columns = [
    { title: "layer", text: true, value: (line) => line.label, cell: (line) => line.label, hint: "By name" },
    bytes("saved", "saved", "Kept from forward to backward"),
    bytes("peak", "peak", "The most that is allocated, by all, while the layer works"),
    bytes("parameter", "parameters", "Weights and buffers"),
    seconds("forward", "forward", "Estimated from the card's rates"),
    seconds("backward", "backward", "Estimated from the card's rates, with what is rebuilt"),
    {
      ...bytes("flops", "FLOPs", "Of forward and backward"),
      cell: (line) => (line.flops ? formatFlops(line.flops) : "–"),
    },
  ];
  return new TreeTable(table, columns, { footer: { ...root, parts: [] }, drawn: count });
}
