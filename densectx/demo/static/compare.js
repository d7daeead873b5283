// Input and answer with a divider between them; for maps of numbers also their scale.
import { h, number } from "./dom.js";
import { Stage } from "./stage.js";

export function compare(result, input, field) {
  const { view } = result;
  const before = h("img", { class: "before", src: input.url, alt: "The picture that was given", draggable: false });
  const after = h("img", { src: view.image.url, alt: `Answer of ${result.task}`, draggable: false });
  const divider = h("input", {
    type: "range", class: "divider", min: 0, max: 100, step: 0.5, value: 50,
    "aria-label": "Divider: share of the width that shows the input", "aria-valuetext": "50 % input",
    oninput: () => {
      before.style.setProperty("--split", `${divider.value}%`);
      divider.setAttribute("aria-valuetext", `${Math.round(divider.value)} % input`);
    },
  });
  const larger = result.width > input.width;
  const tags = [h("span", { class: "tag left" }, larger ? "Input, enlarged" : "Input"), h("span", { class: "tag right" }, "Answer")];
  let numbers = null;
  const ready = view.cells
    ? fetch(view.cells.url).then((response) => response.arrayBuffer()).then((buffer) => { numbers = new Float32Array(buffer); })
    : Promise.resolve();
  const stage = new Stage(result, input, field, [after, before, ...tags, divider], (x, y) =>
    (numbers ? `${number(numbers[y * result.width + x])} at (${x}, ${y})` : `pixel (${x}, ${y})`));
  return { stage, below: view.kind === "values" ? [scale(view, result)] : [], ready };
}

function scale(view, result) {
  const canvas = h("canvas", { width: view.scale.length, height: 1, role: "img", "aria-label": "Colours from the smallest to the largest number" });
  const context = canvas.getContext("2d");
  view.scale.forEach(([r, g, b], i) => {
    context.fillStyle = `rgb(${r} ${g} ${b})`;
    context.fillRect(i, 0, 1, 1);
  });
  const more = result.channels > 1 ? h("span", { class: "quiet" }, `the first of ${result.channels} channels`) : "";
  return h("div", {}, h("div", { class: "scale" }, number(view.low), canvas, number(view.high)), more);
}
