// Small helpers; text is always text: nothing here parses HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties ("class", "aria-..." and "data-..." as attributes), listeners ("on...") and children. */
export function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

let last = 0;
/** An id that no other element has. */
export const unique = (name) => `${name}-${(last += 1)}`;

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** super_resolution -> "Super resolution" */
export const title = (key) => (key[0].toUpperCase() + key.slice(1)).replaceAll("_", " ");

export function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${Math.round(bytes / 1e5) / 10} MB`;
}

export const number = (value) => (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6)
  ? String(Number(value.toPrecision(4))) : value.toExponential(2));

export const percent = (share) => (share > 0 && share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`);
