// Masks of the COCO API, and the map of the segments that are visible at each pixel.

// Returns the lengths of the runs of a mask, alternating between outside and inside, column by column.
// Each length is a little-endian number in groups of five bits, stored as characters from "0" on; from the fourth on,
// it is the difference to the length two before.
export function decodeCounts(text) {
  const counts = [];
  let position = 0;
  while (position < text.length) {
    let value = 0;
    let shift = 0;
    let group;
    do {
      group = text.charCodeAt(position++) - 48;
      value |= (group & 31) << shift;
      shift += 5;
    } while (group & 32);
    if (group & 16) value |= -1 << shift;
    if (counts.length > 2) value += counts[counts.length - 2];
    counts.push(value);
  }
  return counts;
}

// Writes `id` into the pixels of a mask. The map has every `step`-th row and column of the image.
export function fillMask(map, width, height, step, counts, id) {
  const columns = Math.ceil(width / step);
  let start = 0;
  for (let i = 0; i < counts.length; i++) {
    const end = start + counts[i];
    if (i % 2 === 1) fillRun(map, columns, height, step, start, end, id);
    start = end;
  }
}

function fillRun(map, columns, height, step, start, end, id) {
  while (start < end) {
    const column = Math.floor(start / height);
    const top = column * height;
    const stop = Math.min(end, top + height);
    if (column % step === 0) {
      const x = column / step;
      for (let y = Math.ceil((start - top) / step); y * step < stop - top; y++) map[y * columns + x] = id;
    }
    start = stop;
  }
}

// Returns the map of ids: 0 is no segment, n is segment n-1. Where segments overlap, the best score is on top.
export function mapIds(segments, counts, [height, width], step, isVisible) {
  const size = Math.ceil(width / step) * Math.ceil(height / step);
  const map = segments.length < 65536 ? new Uint16Array(size) : new Uint32Array(size);
  const order = segments.map((_, i) => i).sort((a, b) => segments[a].score - segments[b].score || a - b);
  for (const i of order) if (isVisible(segments[i])) fillMask(map, width, height, step, counts[i], i + 1);
  return map;
}
