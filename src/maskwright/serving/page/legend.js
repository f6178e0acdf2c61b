// The classes with their switches, and the list of segments.

import { byId, element, percent, plural, share, swatch } from "./dom.js";

const MAX_SWATCH_COLORS = 4;

// Shows the classes of an answer. `hidden` is a set of category ids that are switched off; `onChange` is called after
// a switch, `onHover` with the indices of the segments of the class under pointer or focus.
export function showLegend(answer, hidden, { onChange, onHover }) {
  const rows = groupByClass(answer.segments).map(([id, indices]) => {
    const segments = indices.map((i) => answer.segments[i]);
    const box = element("input", { type: "checkbox", checked: !hidden.has(id) });
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(id);
      else hidden.add(id);
      onChange();
    });
    const colors = segments.slice(0, MAX_SWATCH_COLORS).map((segment) => segment.color);
    const label = element(
      "label",
      {},
      box,
      swatch(colors),
      element("span", { className: "name" }, segments[0].name),
      element("span", { className: "quiet" }),
    );
    const row = element("li", {}, label);
    row.dataset.category = id;
    for (const type of ["pointerenter", "focusin"]) row.addEventListener(type, () => onHover(indices));
    for (const type of ["pointerleave", "focusout"]) row.addEventListener(type, () => onHover([]));
    return row;
  });
  byId("legend").replaceChildren(...rows);
}

// Shows number and area of the segments of each class that have the min score.
export function countSegments(answer, hasScore) {
  const pixels = answer.size[0] * answer.size[1];
  for (const [id, indices] of groupByClass(answer.segments)) {
    const segments = indices.map((i) => answer.segments[i]).filter(hasScore);
    const area = segments.reduce((sum, segment) => sum + segment.area, 0);
    const count = answer.task === "semantic" ? "" : `${segments.length.toLocaleString("en")} · `;
    document.querySelector(`[data-category="${id}"] .quiet`).textContent = `${count}${share(area / pixels)}`;
  }
}

// Returns [category id, indices of its segments], in the order of the ids.
function groupByClass(segments) {
  const groups = new Map();
  segments.forEach(({ category_id: id }, i) => {
    if (!groups.has(id)) groups.set(id, []);
    groups.get(id).push(i);
  });
  return [...groups].sort(([a], [b]) => a - b);
}

// The list of visible segments: one is active, moved by arrow keys or chosen by a click.
export class SegmentList {
  constructor(onActivate) {
    this.root = byId("segments");
    this.onActivate = onActivate;
    this.clear();
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.activate(Number(option.dataset.index));
    });
  }

  clear() {
    this.indices = [];
    this.active = null;
    this.root.replaceChildren();
  }

  show(answer, isVisible) {
    const kept = this.active;
    this.clear();
    this.indices = answer.segments.map((_, i) => i).filter((i) => isVisible(answer.segments[i]));
    this.root.replaceChildren(...this.indices.map((i) => createOption(answer.segments[i], i)));
    byId("segments-title").textContent = plural(this.indices.length, "segment");
    if (this.indices.includes(kept)) this.activate(kept);
    else this.root.removeAttribute("aria-activedescendant");
  }

  // Makes a segment, given by its index or null, the active one.
  activate(index) {
    this.option(this.active)?.setAttribute("aria-selected", "false");
    this.active = this.indices.includes(index) ? index : null;
    const option = this.option(this.active);
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
    this.root.setAttribute("aria-activedescendant", option?.id ?? "");
    this.onActivate(this.active);
  }

  // Moves to the next (1) or previous (-1) segment.
  step(direction) {
    const position = this.indices.indexOf(this.active);
    const start = direction > 0 ? -1 : this.indices.length;
    const next = (position < 0 ? start : position) + direction;
    if (next >= 0 && next < this.indices.length) this.activate(this.indices[next]);
  }

  // Handles a key; returns whether it is one of the list.
  key(event) {
    const moves = {
      ArrowDown: () => this.step(1),
      ArrowRight: () => this.step(1),
      ArrowUp: () => this.step(-1),
      ArrowLeft: () => this.step(-1),
      Home: () => this.activate(this.indices[0]),
      End: () => this.activate(this.indices.at(-1)),
      Escape: () => this.activate(null),
    };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return false;
    event.preventDefault();
    moves[event.key]();
    return true;
  }

  option(index) {
    return index === null ? null : byId(`segment-${index}`);
  }
}

function createOption(segment, index) {
  const option = element(
    "li",
    { id: `segment-${index}`, role: "option", "aria-selected": "false" },
    swatch([segment.color]),
    element("span", { className: "name" }, segment.name),
    element("span", { className: "quiet" }, describeNumbers(segment)),
  );
  option.dataset.index = index;
  return option;
}

// Returns score and area as text.
export function describeNumbers({ score, area }) {
  const pixels = `${area.toLocaleString("en")} px`;
  return score === null ? pixels : `${percent(score)} · ${pixels}`;
}
