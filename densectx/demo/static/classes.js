// Classes over the picture: how strongly is a slider, each with its area, each to be hidden.
import { h, percent, unique } from "./dom.js";
import { Stage } from "./stage.js";

const SHOWN = 2_000_000; // pixels that are drawn; more would only be averaged by the browser

export function classes(result, input, field) {
  const { view, width, height } = result;
  const step = Math.max(1, Math.ceil(Math.sqrt((width * height) / SHOWN)));
  const canvas = h("canvas", { width: Math.ceil(width / step), height: Math.ceil(height / step), role: "img", "aria-label": `Classes of ${result.task}` });
  const photograph = h("img", { src: input.url, alt: "The picture that was given", draggable: false });
  const visible = view.classes.map(() => true);
  const buttons = new Map();
  let cells = null;

  const at = (x, y) => {
    if (!cells) return [];
    if (view.kind === "classes") return [cells[y * width + x]];
    return view.classes.map((_, i) => i).filter((i) => cells[(i * height + y) * width + x]);
  };
  const draw = () => {
    const image = new ImageData(canvas.width, canvas.height);
    for (let row = 0, to = 0; row < canvas.height; row += 1) {
      for (let column = 0; column < canvas.width; column += 1, to += 4) {
        const here = at(column * step, row * step).filter((i) => visible[i]);
        for (const i of here) view.classes[i].colour.forEach((level, c) => { image.data[to + c] += level / here.length; });
        image.data[to + 3] = here.length ? 255 : 0;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  const stage = new Stage(result, input, field, [photograph, canvas], (x, y) => {
    const here = at(x, y);
    for (const [i, button] of buttons) button.classList.toggle("here", here.includes(i));
    return `${here.map((i) => view.classes[i].name).join(", ") || (cells ? "no class" : "")} at (${x}, ${y})`;
  });

  const order = view.classes.map((_, i) => i).filter((i) => view.classes[i].share > 0);
  order.sort((a, b) => view.classes[b].share - view.classes[a].share);
  const legend = h("ul", { class: "legend", "aria-label": "Classes with their areas" }, ...order.map((i) => {
    const { name, colour, share } = view.classes[i];
    const swatch = h("span", { class: "swatch" });
    swatch.style.background = `rgb(${colour.join(" ")})`;
    const button = h("button", {
      type: "button", "aria-pressed": "true", title: "Show or hide",
      onclick: () => {
        visible[i] = !visible[i];
        button.setAttribute("aria-pressed", String(visible[i]));
        draw();
      },
    }, swatch, h("span", {}, name), h("b", {}, percent(share)));
    buttons.set(i, button);
    return h("li", {}, button);
  }));
  const absent = view.classes.filter(({ share }) => share === 0).map(({ name }) => name);
  const id = unique("blend");
  const blend = h("input", { type: "range", id, min: 0, max: 100, value: 60, oninput: () => { canvas.style.opacity = blend.value / 100; } });
  canvas.style.opacity = 0.6;
  const ready = view.cells
    ? fetch(view.cells.url).then((response) => response.arrayBuffer()).then((buffer) => {
      cells = view.bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer);
      draw();
    }) : Promise.resolve();
  const below = [h("div", { class: "blend" }, h("label", { htmlFor: id }, "Strength of the colours"), blend), legend];
  if (absent.length) below.push(h("p", { class: "quiet small" }, `Not found: ${absent.join(", ")}.`));
  return { stage, below, ready };
}
