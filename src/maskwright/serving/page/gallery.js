// The list of images, with thumbnails and the state of each.

import { byId, element } from "./dom.js";

export function addRow(entry, { onSelect, onRemove }) {
  const state = element("span", { className: "state" });
  const picture = element("img", { src: entry.url, alt: "", decoding: "async" });
  picture.addEventListener("error", () => picture.removeAttribute("src")); // no broken image
  const select = element(
    "button",
    { type: "button", className: "thumbnail", title: entry.name },
    picture,
    element("span", { className: "name" }, entry.name),
    state,
  );
  const remove = element("button", { type: "button", className: "remove", "aria-label": `Remove ${entry.name}` }, "×");
  select.addEventListener("click", () => onSelect(entry));
  remove.addEventListener("click", () => onRemove(entry));
  entry.row = element("li", {}, select, remove);
  byId("gallery").append(entry.row);
}

// `result` describes the answer of an entry that is done.
export function updateRow(entry, isCurrent, result) {
  const state = entry.row.querySelector(".state");
  state.textContent = { done: result, working: "segmenting…" }[entry.state] ?? entry.state;
  state.dataset.state = entry.state;
  entry.row.querySelector(".thumbnail").setAttribute("aria-current", String(isCurrent));
}
