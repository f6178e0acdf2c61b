// The overlay: segments in their colors on a canvas, outlined as by `maskwright predict`.

import { decodeCounts, mapIds } from "./decode_rle.js";

const MAX_PIXELS = 2 ** 24; // of a canvas; the limit of some phones

export class Overlay {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.opacity = 0.5;
    this.clear();
  }

  clear() {
    this.answer = null;
    this.highlighted = new Set();
    this.canvas.width = this.canvas.height = 0;
  }

  // Takes an answer of the service, for `filter` to draw. Large images get every second, third, ... row and column.
  show(answer) {
    const [height, width] = answer.size;
    this.answer = answer;
    this.counts = answer.segments.map((segment) => decodeCounts(segment.mask.counts));
    this.step = Math.max(1, Math.ceil(Math.sqrt((width * height) / MAX_PIXELS)));
    this.canvas.width = Math.ceil(width / this.step);
    this.canvas.height = Math.ceil(height / this.step);
    this.pixels = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.highlighted = new Set();
  }

  // Draws only the segments for which `isVisible` is true.
  filter(isVisible) {
    if (!this.answer) return;
    this.ids = mapIds(this.answer.segments, this.counts, this.answer.size, this.step, isVisible);
    this.entries = findOutlines(this.ids, this.canvas.width, this.canvas.height);
    this.paint();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.paint();
  }

  // Emphasizes segments, given by their indices.
  highlight(indices) {
    const before = this.highlighted;
    this.highlighted = new Set(indices);
    for (const i of new Set([...before, ...this.highlighted])) this.paint(this.box(i));
  }

  // Returns the index of the segment at a pixel of the image, or null.
  at(x, y) {
    if (!this.answer) return null;
    const [column, row] = [Math.floor(x / this.step), Math.floor(y / this.step)];
    if (column < 0 || row < 0 || column >= this.canvas.width || row >= this.canvas.height) return null;
    const id = this.ids[row * this.canvas.width + column];
    return id ? id - 1 : null;
  }

  // Returns the box of a segment on the canvas: x, y, width, height.
  box(index) {
    const [x0, y0, x1, y1] = this.answer.segments[index].box.map((value) => value / this.step);
    const [x, y] = [Math.floor(x0), Math.floor(y0)];
    return [x, y, Math.min(this.canvas.width, Math.ceil(x1)) - x, Math.min(this.canvas.height, Math.ceil(y1)) - y];
  }

  paint([x, y, width, height] = [0, 0, this.canvas.width, this.canvas.height]) {
    if (!this.answer || width <= 0 || height <= 0) return;
    const table = this.colorTable();
    const target = new Uint32Array(this.pixels.data.buffer);
    for (let row = y; row < y + height; row++) {
      const start = row * this.canvas.width + x;
      for (let i = start; i < start + width; i++) target[i] = table[this.entries[i]];
    }
    this.context.putImageData(this.pixels, 0, 0, x, y, width, height);
  }

  // Returns the color of each entry of `findOutlines`.
  colorTable() {
    const outlined = this.answer.task !== "semantic";
    const table = new Uint32Array(2 * this.answer.segments.length + 2);
    this.answer.segments.forEach(({ color }, i) => {
      const emphasized = this.highlighted.has(i);
      const inside = emphasized ? Math.min(1, this.opacity + 0.25) : this.opacity;
      table[2 * i + 2] = pack(color, inside);
      table[2 * i + 3] = emphasized ? pack([255, 255, 255], 1) : pack(color, outlined ? 1 : inside);
    });
    return table;
  }
}

// Returns for each pixel twice its id, plus 1 where it touches a pixel with another id.
function findOutlines(ids, width, height) {
  const entries = new Uint32Array(ids.length);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const id = ids[i];
      if (id === 0) continue;
      const touches =
        (x > 0 && ids[i - 1] !== id) ||
        (x < width - 1 && ids[i + 1] !== id) ||
        (y > 0 && ids[i - width] !== id) ||
        (y < height - 1 && ids[i + width] !== id);
      entries[i] = 2 * id + (touches ? 1 : 0);
    }
  }
  return entries;
}

// Returns a color as a pixel of ImageData on a little-endian machine.
function pack([red, green, blue], opacity) {
  return ((Math.round(255 * opacity) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
