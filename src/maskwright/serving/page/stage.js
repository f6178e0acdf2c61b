// Where the image is shown: fitted, zoomed and moved by mouse, fingers and keys; both panes move together.

const MAX_SCALE = 40;
const TAP_PIXELS = 5; // a pointer that moves less has clicked

export class Stage {
  // `onPoint(x, y, event)` gets the pixel of the image under the pointer, or null; `onPick` the pixel that is clicked.
  constructor(root, { onPoint, onPick }) {
    Object.assign(this, { root, onPoint, onPick });
    this.size = null;
    this.pointers = new Map();
    new ResizeObserver(() => this.refit()).observe(root.querySelector(".pane"));
    root.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    root.addEventListener("pointerdown", (event) => this.down(event));
    root.addEventListener("pointermove", (event) => this.move(event));
    root.addEventListener("pointerup", (event) => this.up(event));
    root.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    root.addEventListener("pointerleave", (event) => this.leave(event));
  }

  // Shows an image of this size as a whole; null shows none.
  setSize(size) {
    const same = size && this.size && size.width === this.size.width && size.height === this.size.height;
    this.size = size;
    if (size && !same) this.fit();
  }

  get pane() {
    return this.root.querySelector(".pane").getBoundingClientRect();
  }

  get fitScale() {
    return Math.min(this.pane.width / this.size.width, this.pane.height / this.size.height);
  }

  fit() {
    if (!this.size) return;
    this.fitted = true;
    this.place(this.fitScale, 0, 0);
  }

  refit() {
    if (!this.size) return;
    if (this.fitted) this.fit();
    else this.place(this.scale, this.x, this.y);
  }

  // Zooms by a factor and keeps the point (x, y) of the pane, by default its center, where it is.
  zoom(factor, x = this.pane.width / 2, y = this.pane.height / 2) {
    if (!this.size) return;
    const scale = Math.min(MAX_SCALE, Math.max(this.fitScale, this.scale * factor));
    const ratio = scale / this.scale;
    this.fitted = scale <= this.fitScale;
    this.place(scale, x - (x - this.x) * ratio, y - (y - this.y) * ratio);
  }

  // Sets scale and offset. The image covers the pane, or is in its middle.
  place(scale, x, y) {
    const { width, height } = this.pane;
    const inside = (offset, pane, image) =>
      image <= pane ? (pane - image) / 2 : Math.min(0, Math.max(pane - image, offset));
    this.scale = scale;
    this.x = inside(x, width, this.size.width * scale);
    this.y = inside(y, height, this.size.height * scale);
    const { style, classList } = this.root;
    style.setProperty("--place", `translate(${this.x}px, ${this.y}px) scale(${scale})`);
    style.setProperty("--width", `${this.size.width}px`);
    style.setProperty("--height", `${this.size.height}px`);
    style.setProperty("--ratio", this.size.width / this.size.height);
    classList.toggle("zoomed", !this.fitted);
    classList.toggle("enlarged", scale >= 2);
  }

  // Moves the image if a pixel is not in view; returns where the pixel is on the stage.
  reveal(column, row) {
    const { width, height } = this.pane;
    let [x, y] = [this.x + column * this.scale, this.y + row * this.scale];
    if (x < 0 || y < 0 || x > width || y > height) {
      this.place(this.scale, width / 2 - column * this.scale, height / 2 - row * this.scale);
      [x, y] = [this.x + column * this.scale, this.y + row * this.scale];
    }
    return [x, y];
  }

  // Returns the position of an event in its pane.
  position(event) {
    const pane = event.target.closest?.(".pane");
    if (!pane || !this.size) return null;
    const box = pane.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  pixel({ x, y }) {
    return [(x - this.x) / this.scale, (y - this.y) / this.scale];
  }

  wheel(event) {
    const position = this.position(event);
    if (!position || (this.fitted && event.deltaY > 0)) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / 400), position.x, position.y);
  }

  down(event) {
    const position = this.position(event);
    if (!position) return;
    this.pointers.set(event.pointerId, { start: position, last: position });
  }

  move(event) {
    const position = this.position(event);
    if (!position) return this.onPoint(null);
    const pointer = this.pointers.get(event.pointerId);
    if (pointer) this.drag(pointer, position);
    if (event.pointerType !== "touch") this.onPoint(...this.pixel(position), event);
  }

  leave(event) {
    this.pointers.delete(event.pointerId);
    if (event.pointerType !== "touch") this.onPoint(null);
  }

  // One pointer moves the image, two zoom it.
  drag(pointer, position) {
    const before = this.spread();
    const [dx, dy] = [position.x - pointer.last.x, position.y - pointer.last.y];
    pointer.last = position;
    if (this.pointers.size === 2) {
      const after = this.spread();
      if (before.distance > 0) this.zoom(after.distance / before.distance, after.x, after.y);
    } else if (!this.fitted && !isClick(pointer)) {
      this.place(this.scale, this.x + dx, this.y + dy);
    }
  }

  spread() {
    const [a, b] = [...this.pointers.values()].map((pointer) => pointer.last);
    if (!b) return { distance: 0 };
    return { distance: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  }

  up(event) {
    const pointer = this.pointers.get(event.pointerId);
    this.pointers.delete(event.pointerId);
    if (pointer && isClick(pointer)) this.onPick(...this.pixel(pointer.start), event);
  }
}

function isClick({ start, last }) {
  return Math.hypot(start.x - last.x, start.y - last.y) < TAP_PIXELS;
}
