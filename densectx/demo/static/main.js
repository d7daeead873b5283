// The page: choose a picture and tasks, run, show the answers.
import { classes } from "./classes.js";
import { compare } from "./compare.js";
import { $, h, number, size, title, unique } from "./dom.js";
import { answer, Failure } from "./run.js";

const KINDS = { classes: "classes", labels: "labels", restored: "picture", image: "picture", values: "numbers" };
const state = { about: null, file: null, running: null, preview: "" };

function say(words) { $("status").textContent = words; }

function fail(words) {
  $("error").hidden = !words;
  $("error").textContent = words;
}

function choose(file, name, pressed = null) {
  fail("");
  if (state.about && file.size > state.about.limits.bytes) {
    fail(`The file has ${size(file.size)}; this page takes up to ${size(state.about.limits.bytes)}.`);
    return;
  }
  state.file = file;
  URL.revokeObjectURL(state.preview);
  state.preview = URL.createObjectURL(file);
  const preview = $("preview");
  preview.hidden = false;
  preview.alt = `Chosen: ${name}`;
  preview.onerror = () => { preview.hidden = true; };
  preview.src = state.preview;
  $("drop-text").replaceChildren(h("strong", {}, name), ` · ${size(file.size)} · `, h("span", { class: "link" }, "choose another"));
  for (const button of $("examples").children) button.setAttribute("aria-pressed", String(button === pressed));
  say(`${name} is chosen.`);
  ready();
}

function ready() {
  $("run").disabled = !state.file || state.running !== null || chosen().length === 0;
}

const chosen = () => [...document.querySelectorAll(".task input[type=checkbox]:checked")].map((box) => box.value);

function options() {
  const found = {};
  for (const input of document.querySelectorAll(".option input")) {
    if (input.value !== "" && chosen().includes(input.dataset.task)) found[`${input.dataset.task}.${input.dataset.option}`] = input.value;
  }
  return found;
}

function addTasks() {
  $("tasks").replaceChildren(...state.about.tasks.map((task) => {
    const kind = task.scale > 1 ? `${task.scale} × larger` : KINDS[task.output];
    const box = h("input", { type: "checkbox", value: task.key, checked: true, onchange: ready });
    const rows = task.options.map((option) => {
      const id = unique("option");
      const input = h("input", {
        type: "number", id, step: "any", min: 0, "data-task": task.key, "data-option": option.name,
        placeholder: option.estimated ? "estimated" : String(option.default ?? ""),
      });
      return h("div", { class: "option" }, h("label", { htmlFor: id }, title(option.name)), input);
    });
    return h("div", { class: "task" }, h("label", {}, box, h("span", {}, title(task.key)), h("span", { class: "quiet small" }, kind)), ...rows);
  }));
}

function addExamples() {
  $("examples").replaceChildren(...state.about.examples.map((example) => {
    const url = `/api/examples/${example.name}`;
    const button = h("button", {
      type: "button", class: "example", "aria-pressed": "false",
      onclick: async () => {
        try {
          choose(await (await fetch(url)).blob(), example.title, button);
        } catch {
          fail("The server does not answer. Is densectx demo still running?");
        }
      },
    }, h("img", { src: url, alt: "", loading: "lazy" }), h("span", {}, example.title));
    return button;
  }));
}

function card(result, input) {
  const { field } = state.about.tasks.find((task) => task.key === result.task);
  const show = result.view.kind === "classes" || result.view.kind === "labels" ? classes : compare;
  const viewable = show === classes || result.view.image;
  const { stage, below, ready: drawn } = show(result, input, field);
  const told = [`${result.width} × ${result.height}`];
  for (const [name, value] of Object.entries(result.estimated)) told.push(`${name} estimated: ${value < 1e-4 ? 0 : number(value)}`);
  const id = unique("answer");
  const files = result.files.map((file) => h("a", { href: file.url, download: file.name }, `${file.name} (${size(file.size)})`));
  const element = h("article", { class: "card", "aria-labelledby": id, "data-task": result.task },
    h("header", {},
      h("div", {}, h("h3", { id }, title(result.task)), h("p", { class: "quiet small" }, told.join(" · "))),
      h("div", { class: "tools" }, ...stage.tools())),
    ...(viewable ? [stage.frame, stage.readout, ...below] : []),
    h("div", { class: "files" }, h("span", { class: "quiet" }, "Download"), ...files));
  return { element, drawn };
}

function told(now) {
  const progress = $("progress");
  if (now.state === "running") {
    progress.value = now.share;
    say(`${now.stage} …`);
  } else {
    progress.removeAttribute("value");
    if (now.state === "full") say(`${now.message} Trying again …`);
    else say(now.before ? `Waiting: ${now.before} ${now.before === 1 ? "picture is" : "pictures are"} answered first.` : "Waiting …");
  }
}

async function run(event) {
  event.preventDefault();
  if (state.running || $("run").disabled) return;
  fail("");
  state.running = new AbortController();
  ready();
  $("cancel").hidden = $("progress").hidden = false;
  $("answers").classList.add("old");
  told({ state: "queued", before: 0 });
  try {
    const found = await answer(state.file, chosen(), options(), state.running.signal, told);
    const cards = found.results.map((result) => card(result, found.input));
    await Promise.all(cards.map(({ drawn }) => drawn));
    $("answers").replaceChildren(...cards.map(({ element }) => element));
    say(`${cards.length} ${cards.length === 1 ? "answer" : "answers"} in ${found.seconds.toFixed(1)} s.`);
    if (matchMedia("(max-width: 900px)").matches) $("answers").scrollIntoView({ behavior: "smooth" });
  } catch (error) {
    if (error instanceof Failure) fail(error.message);
    else if (error.name !== "AbortError") throw error;
    say(error instanceof Failure ? "" : "Cancelled.");
  } finally {
    state.running = null;
    $("cancel").hidden = $("progress").hidden = true;
    $("answers").classList.remove("old");
    ready();
  }
}

function listen() {
  $("controls").addEventListener("submit", run);
  $("cancel").addEventListener("click", () => { state.running?.abort(); $("run").focus(); });
  $("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) choose(file, file.name);
  });
  addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) choose(file, file.name);
    else fail("What was dropped is no file; save the picture first, then drop it.");
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file) choose(file, "Pasted picture");
  });
}

async function start() {
  listen();
  try {
    state.about = await (await fetch("/api/model")).json();
  } catch {
    fail("The server does not answer. Is densectx demo still running?");
    return;
  }
  const { name, device, parameters, limits } = state.about;
  const count = parameters >= 1e6 ? `${number(parameters / 1e6)} million` : `${Math.round(parameters / 1e3)} thousand`;
  $("model").textContent = `${name} · ${count} parameters · on ${device}`;
  $("kinds").textContent = `PNG, JPEG, WebP, BMP, TIFF, PPM or .npy, up to ${size(limits.bytes)} and ${number(limits.pixels / 1e6)} million pixels.`;
  document.title = `${name} – densectx demo`;
  addTasks();
  addExamples();
  ready();
}

start();
