// Small helpers for elements.

export const byId = (id) => document.getElementById(id);

// Returns a new element. Properties are those of the DOM; names with a dash are attributes.
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

export function swatch(colors) {
  const node = element("span", { className: "swatch" });
  const stripes = colors.map((color, i) => {
    const [from, to] = [i, i + 1].map((n) => `${(100 * n) / colors.length}%`);
    return `rgb(${color.join(" ")}) ${from} ${to}`;
  });
  node.style.background = `linear-gradient(135deg, ${stripes.join(", ")})`;
  return node;
}

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
export const percent = (fraction) => `${Math.round(100 * fraction)} %`;
export const share = (fraction) => `${(100 * fraction).toFixed(fraction < 0.1 ? 1 : 0)} %`;
