// Quantities in words, as memseg.units writes them.

const GIB = 2 ** 30;
const MIB = 2 ** 20;

/** A formatter to a number of digits that rounds halves to even, as Python does: 128 MiB are 0.12 GiB. */
function digits(count) {
  const options = { minimumFractionDigits: count, maximumFractionDigits: count, useGrouping: false };
  const format = new Intl.NumberFormat("en", { ...options, roundingMode: "halfEven" });
  return (number) => format.format(number);
}

const oneDigit = digits(1);
const twoDigits = digits(2);

function formatBytes(size) {
  const magnitude = Math.abs(size);
  if (magnitude >= Math.floor(GIB / 10)) return `${twoDigits(size / GIB)} GiB`;
  if (magnitude >= MIB) return `${oneDigit(size / MIB)} MiB`;
  if (magnitude >= 1024) return `${oneDigit(size / 1024)} KiB`;
  return `${size} B`;
}

function formatSeconds(seconds) {
  if (seconds < 1) return `${oneDigit(seconds * 1000)} ms`;
  if (seconds < 120) return `${twoDigits(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function formatFlops(flops) {
  const [unit, name] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([unit]) => flops >= unit) ?? [1, ""];
  return `${unit === 1 ? flops : twoDigits(flops / unit)} ${name}FLOP`;
}

function formatShare(part, whole) {
  return `${oneDigit((100 * part) / Math.max(1, whole))} %`;
}

function formatCount(number) {
  return number.toLocaleString("en");
}
