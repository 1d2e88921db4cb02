// Which of a model's tensors are done: a row for each module, a column for each layer; where a model has no such layers,
// or too many, cells in the order of the output, each for several tensors.

const SVG = "http://www.w3.org/2000/svg";
const MOST_ROWS = 48;
const MOST_COLUMNS = 256;
const STRIP = 240;

/** A tensor's module and layer: the first number in its name is the layer, any other may be whichever. */
function placeOf(name) {
  const parts = name.split(".");
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  if (at < 0) return undefined;
  const module = parts.map((part, each) => (each === at ? "·" : /^\d+$/.test(part) ? "*" : part));
  return { module: module.join("."), layer: Number(parts[at]) };
}

/** Rows of cells, each with the places of its tensors: `{ label, cells: [{ column, places, title }], columns }`. */
function arrange(names) {
  const rows = new Map();
  const others = [];
  let layers = 0;
  names.forEach((name, place) => {
    const found = placeOf(name);
    if (!found) return others.push(place);
    if (!rows.has(found.module)) rows.set(found.module, new Map());
    const row = rows.get(found.module);
    if (!row.has(found.layer)) row.set(found.layer, []);
    row.get(found.layer).push(place);
    layers = Math.max(layers, found.layer + 1);
  });
  if (!rows.size || rows.size > MOST_ROWS || layers > MOST_COLUMNS) return [strip("all tensors", names.map((_, place) => place), names)];
  const grid = [...rows].map(([module, row]) => ({
    label: short(module),
    title: module,
    columns: layers,
    cells: [...row].map(([layer, places]) => ({ column: layer, places, title: titleOf(places, names) })),
  }));
  return others.length ? [...grid, strip("outside the layers", others, names, layers)] : grid;
}

function strip(label, places, names, columns = 0) {
  const each = Math.ceil(places.length / STRIP);
  const cells = [];
  for (let at = 0; at < places.length; at += each) {
    const some = places.slice(at, at + each);
    cells.push({ column: cells.length, places: some, title: titleOf(some, names) });
  }
  return { label, title: label, columns: Math.max(columns, cells.length), cells };
}

const titleOf = (places, names) =>
  places.length === 1 ? names[places[0]] : `${names[places[0]]} … ${names[places.at(-1)]}: ${places.length} tensors`;

/** A module's name without what nearly all of them begin and end with. */
const short = (module) => module.slice(module.indexOf("·") + 2).replace(/\.weight$/, "") || module;

/** Draws the map of these tensors into an element; `show` is told which are done, as runs, and which is at work. */
export class TensorMap {
  constructor(place, names) {
    this.names = names;
    this.size = names.length;
    this.cells = [];
    const rows = arrange(names);
    this.isGrid = rows.length > 1;
    this.placeOf = new Map(names.map((name, at) => [name, at]));
    place.replaceChildren(
      ...rows.flatMap((row) => {
        const label = document.createElement("span");
        label.className = "module";
        label.textContent = row.label;
        label.title = row.title;
        const drawn = document.createElementNS(SVG, "svg");
        drawn.setAttribute("viewBox", `0 0 ${row.columns} 1`);
        drawn.setAttribute("preserveAspectRatio", "none");
        for (const { column, places, title } of row.cells) {
          const rect = document.createElementNS(SVG, "rect");
          for (const [name, value] of Object.entries({ x: column + 0.06, y: 0, width: 0.88, height: 1 })) rect.setAttribute(name, value);
          const told = document.createElementNS(SVG, "title");
          told.textContent = title;
          rect.append(told);
          drawn.append(rect);
          this.cells.push({ rect, places });
        }
        return [label, drawn];
      }),
    );
  }

  /** `runs`: `[first, one after the last]` of what is done, in order. How many are done. */
  show(runs, tensor) {
    const done = new Uint8Array(this.size);
    for (const [begin, end] of runs) done.fill(1, begin, end);
    const at = this.placeOf.get(tensor);
    for (const { rect, places } of this.cells) {
      const finished = places.reduce((sum, place) => sum + done[place], 0);
      const isAtWork = at !== undefined && !done[at] && places.includes(at);
      const state = isAtWork ? "at-work" : finished === places.length ? "done" : finished ? "part" : "";
      if (rect.getAttribute("class") !== state) rect.setAttribute("class", state);
      if (state === "part") rect.setAttribute("fill-opacity", (0.25 + (0.75 * finished) / places.length).toFixed(2));
      else rect.removeAttribute("fill-opacity");
    }
    return done.reduce((sum, each) => sum + each, 0);
  }
}
