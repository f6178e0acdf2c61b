// Files that the page saves.

import { element } from "./dom.js";

export function saveJson(entry) {
  save(new Blob([entry.text], { type: "application/json" }), `${stem(entry.name)}.json`);
}

// Saves the image with the overlay as it is shown.
export async function savePng(entry, picture, overlay) {
  const canvas = element("canvas", { width: overlay.width, height: overlay.height });
  const context = canvas.getContext("2d");
  if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.drawImage(overlay, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  save(blob, `${stem(entry.name)}_overlay.png`);
}

function save(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const stem = (name) => name.replace(/\.[^.]+$/, "") || name;
