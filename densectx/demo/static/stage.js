// A picture to look at: zoom, a point under the pointer or moved by arrow keys, and what that point sees.
import { clamp, h, unique } from "./dom.js";

const HINT = "Point at the picture, or focus it and use the arrow keys.";
const ZOOMS = [["Fit", 0], ["100 %", 1], ["200 %", 2], ["400 %", 4]];

/** Pixels of a side of the picture that output position p sees, [from, to); null stands for all of them. */
export function seen(side, p, whole) {
  if (side === null) return [0, whole];
  const start = Math.floor(p / side.period) * side.step;
  const phase = p % side.period;
  return [start + side.first[phase], start + side.last[phase] + 1];
}

export class Stage {
  /** result and input as the server tells them; field of the task; layers: elements; probed(x, y) -> words. */
  constructor(result, input, field, layers, probed) {
    Object.assign(this, { result, input, field, probed, point: null, drawn: false });
    this.box = h("div", { class: "field-box", hidden: true });
    this.dot = h("div", { class: "field-dot", hidden: true });
    this.element = h("div", { class: "stage" }, ...layers, this.box, this.dot);
    this.readout = h("output", { class: "readout", "aria-live": "off" }, HINT);
    this.frame = h("div", {
      class: "frame", tabIndex: 0, role: "group",
      "aria-label": `Picture of ${result.task}; arrow keys move the point that is read off`,
      onkeydown: (event) => this.key(event),
    }, this.element);
    this.element.addEventListener("pointermove", (event) => this.pointer(event));
    this.element.addEventListener("pointerleave", () => this.leave());
    this.zoom(0);
  }

  tools() {
    const group = unique("zoom");
    const zooms = h("div", { class: "segments", role: "radiogroup", "aria-label": "Size" }, ...ZOOMS.map(([words, factor]) =>
      h("label", {}, h("input", { type: "radio", name: group, checked: factor === 0, onchange: () => this.zoom(factor) }),
        h("span", {}, words))));
    if (!this.field) return [zooms];
    const check = h("input", { type: "checkbox", onchange: () => { this.drawn = check.checked; this.show(true); } });
    return [zooms, h("label", { class: "switch" }, check, "Receptive field")];
  }

  zoom(factor) {
    const { width, height } = this.result;
    this.element.style.aspectRatio = `${width} / ${height}`;
    this.element.style.width = factor ? `${(width * factor) / devicePixelRatio}px` : `min(100%, calc(74vh * ${width / height}))`;
    this.element.classList.toggle("large", factor >= 2);
    const { frame } = this;
    const [x, y] = this.point ?? [width / 2, height / 2];
    frame.scrollTo((x / width) * frame.scrollWidth - frame.clientWidth / 2, (y / height) * frame.scrollHeight - frame.clientHeight / 2);
  }

  pointer(event) {
    const place = this.element.getBoundingClientRect();
    const at = (from, length, count) => clamp(Math.floor((from / length) * count), 0, count - 1);
    this.point = [at(event.clientX - place.left, place.width, this.result.width),
      at(event.clientY - place.top, place.height, this.result.height)];
    this.show(false);
  }

  leave() {
    if (document.activeElement === this.frame) return;
    this.point = null;
    this.show(false);
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.target !== this.frame || !(event.key in moves)) return;
    event.preventDefault();
    const { width, height } = this.result;
    const step = Math.max(1, Math.round(Math.max(width, height) / (event.shiftKey ? 10 : 100)));
    const [x, y] = this.point ?? [Math.floor(width / 2), Math.floor(height / 2)];
    const [dx, dy] = moves[event.key];
    this.point = [clamp(x + dx * step, 0, width - 1), clamp(y + dy * step, 0, height - 1)];
    this.show(true);
    this.dot.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Draw the point; aloud: whether a screen reader says what is there. */
  show(aloud) {
    const point = this.point ?? (this.drawn ? [this.result.width >> 1, this.result.height >> 1] : null);
    this.box.hidden = !point || !this.drawn;
    this.dot.hidden = !point || !(this.drawn || document.activeElement === this.frame);
    this.readout.setAttribute("aria-live", aloud ? "polite" : "off");
    this.readout.textContent = point ? [this.probed(...point), this.drawn ? this.place(...point) : ""].filter(Boolean).join(" · ") : HINT;
    if (!point) return;
    this.dot.style.left = `${((point[0] + 0.5) / this.result.width) * 100}%`;
    this.dot.style.top = `${((point[1] + 0.5) / this.result.height) * 100}%`;
  }

  /** Put the box around what the point sees; in words how much that is. */
  place(x, y) {
    const { width, height } = this.input;
    const [left, right] = seen(this.field.w, x, width);
    const [top, bottom] = seen(this.field.h, y, height);
    Object.assign(this.box.style, {
      left: `${(left / width) * 100}%`, width: `${((right - left) / width) * 100}%`,
      top: `${(top / height) * 100}%`, height: `${((bottom - top) / height) * 100}%`,
    });
    const inside = (from, to, whole) => (Math.min(to, whole) - Math.max(from, 0)) / whole;
    const share = inside(left, right, width) * inside(top, bottom, height);
    if (this.field.w === null && this.field.h === null) return "sees the whole picture, of any size";
    const wide = this.field.w === null ? "all" : Math.round(right - left);
    const high = this.field.h === null ? "all" : Math.round(bottom - top);
    return `sees ${wide} × ${high} pixels, ${share > 0.9995 ? "all" : `${(share * 100).toFixed(1)} %`} of this picture`;
  }
}
