// The page: connects controls, requests and drawing.

import { Problem, fetchModels, hasToken, keepToken } from "./api.js";
import { byId, element, percent, plural, share, swatch } from "./dom.js";
import { saveJson, savePng } from "./download.js";
import { Overlay } from "./draw.js";
import { addRow, updateRow } from "./gallery.js";
import { SegmentList, countSegments, describeNumbers, showLegend } from "./legend.js";
import { Queue } from "./queue.js";
import { Stage } from "./stage.js";

const INSTANCE_MIN_SCORE = 30; // percent; as in the overlays of `maskwright predict`
const TIP_GAP = 14; // pixels between a point and its tip

let models = {};
const hiddenClasses = new Set();
const overlay = new Overlay(byId("overlay"));
const list = new SegmentList(showActive);
const stage = new Stage(byId("stage"), { onPoint: showPointed, onPick: (x, y) => list.activate(overlay.at(x, y)) });
const queue = new Queue({ settings, onChange: refresh, onAnswer: announceAnswer, onToken: () => askToken(true) });
const pictures = document.querySelectorAll(".picture");

// Settings

const task = () => document.querySelector("[name=task]:checked").value;
const thresholds = () => [...document.querySelectorAll(`[data-task=${task()}] input`)];

function settings() {
  const given = thresholds().filter((input) => input.value !== "");
  const options = { task: task(), ...Object.fromEntries(given.map((input) => [input.name, input.value])) };
  return { model: byId("model").value, options };
}

function showModel() {
  const model = models[byId("model").value];
  for (const radio of document.querySelectorAll("[name=task]")) {
    radio.disabled = !model.tasks.includes(radio.value);
    radio.checked = radio.value === model.task;
  }
  for (const input of document.querySelectorAll("#thresholds input")) input.placeholder = model[input.name];
  hiddenClasses.clear();
  showTask();
}

function showTask() {
  for (const field of document.querySelectorAll("#thresholds [data-task]")) field.hidden = field.dataset.task !== task();
  byId("min-score").value = task() === "instance" ? INSTANCE_MIN_SCORE : 0;
  showCurl();
}

function showCurl() {
  const { model, options } = settings();
  const quote = (text) => (/^[\w.=@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const fields = [`image=@${queue.current?.name ?? "image.png"}`, ...Object.entries(options).map((pair) => pair.join("="))];
  const words = fields.map((field) => `-F ${quote(field)}`);
  if (hasToken()) words.unshift('-H "Authorization: Bearer $MASKWRIGHT_TOKEN"');
  const address = new URL(`v1/models/${model}/segment`, document.baseURI);
  byId("curl").textContent = ["curl", ...words, address].join(" \\\n  ");
}

function restart() {
  if (!thresholds().every((input) => input.reportValidity())) return;
  showCurl();
  queue.restart();
}

// Images

function addImages(files) {
  const added = queue.add(files);
  for (const entry of added) {
    addRow(entry, { onSelect: select, onRemove: remove });
    refreshRow(entry);
  }
  if (added.length) select(added[0]);
  if (!byId("model").disabled) queue.work(); // otherwise, `start` does
}

async function addSample(name) {
  const response = await fetch(`page/${name}`);
  addImages([new File([await response.blob()], name)]);
}

function select(entry) {
  queue.current = entry;
  queue.entries.forEach(refreshRow);
  byId("stage").classList.toggle("empty", !entry);
  for (const picture of pictures) picture.src = entry?.url ?? "";
  overlay.clear();
  stage.setSize(null);
  showAnswer(entry);
  if (entry) {
    showProblem(entry);
    for (const node of [entry.row, byId("view")]) node.scrollIntoView({ block: "nearest", inline: "nearest" });
  } else byId("note").hidden = byId("problem").hidden = true;
  showCurl();
}

function remove(entry) {
  const position = queue.entries.indexOf(entry);
  queue.remove(entry);
  entry.row.remove();
  if (entry === queue.current) select(queue.entries[Math.min(position, queue.entries.length - 1)] ?? null);
}

// Shows the picture once it is decoded, at the size of the answer if there is one.
function showPicture() {
  const [picture] = pictures;
  const answer = queue.current?.answer;
  const isShown = picture.naturalWidth > 0;
  byId("stage").classList.toggle("unseen", !isShown);
  if (answer) stage.setSize({ height: answer.size[0], width: answer.size[1] });
  else if (isShown) stage.setSize({ height: picture.naturalHeight, width: picture.naturalWidth });
  const isForeign = answer && picture.complete && !isShown;
  byId("note").hidden = !isForeign;
  byId("note").textContent = "This browser cannot display such a file; its segments are drawn without it.";
}

// Answers

const hasScore = (segment) => (segment.score ?? 1) >= byId("min-score").value / 100;
const isVisible = (segment) => hasScore(segment) && !hiddenClasses.has(segment.category_id);

function describeAnswer({ task, segments }) {
  const count = segments.filter(hasScore).length;
  if (task === "semantic") return count === 1 ? "1 class" : `${count} classes`;
  return plural(count, "segment");
}

function announceAnswer(entry) {
  const found = describeAnswer(entry.answer);
  byId("status").textContent = `${entry.name}: ${found} in ${entry.seconds.toFixed(1)} s`;
  if (entry === queue.current) showAnswer(entry);
}

function showAnswer(entry) {
  const answer = entry?.answer;
  list.clear();
  showTip(null);
  byId("nothing").hidden = Boolean(answer);
  byId("results").hidden = byId("save-png").disabled = byId("save-json").disabled = !answer;
  if (!answer) return;
  overlay.show(answer);
  showPicture();
  showLegend(answer, hiddenClasses, { onChange: filter, onHover: (indices) => emphasize(indices) });
  byId("segments-section").hidden = answer.task === "semantic";
  byId("min-score-field").hidden = answer.task === "semantic" || !answer.segments.length;
  filter();
}

// Shows the segments of the classes that are switched on, from the min score on.
function filter() {
  byId("min-score-text").textContent = percent(byId("min-score").value / 100);
  if (!overlay.answer) return;
  overlay.filter(isVisible);
  countSegments(overlay.answer, hasScore);
  list.show(overlay.answer, isVisible);
  queue.entries.forEach(refreshRow);
}

function emphasize(indices) {
  if (overlay.answer) overlay.highlight(indices.length ? indices : [list.active].filter((index) => index !== null));
}

function showPointed(x, y, event) {
  const index = x === null ? null : overlay.at(x, y);
  emphasize(index === null ? [] : [index]);
  if (index === null) return showTip(null);
  const box = byId("stage").getBoundingClientRect();
  showTip(index, event.clientX - box.left, event.clientY - box.top);
}

function showActive(index) {
  emphasize([]);
  if (index === null) return showTip(null);
  const [x0, y0, x1, y1] = overlay.answer.segments[index].box;
  const [x, y] = stage.reveal((x0 + x1) / 2, (y0 + y1) / 2);
  showTip(index, x, y);
  if (document.activeElement === byId("stage")) byId("status").textContent = byId("tip").textContent;
}

// Shows name, score and area beside a point of the stage.
function showTip(index, x, y) {
  const tip = byId("tip");
  tip.hidden = index === null;
  if (index === null) return;
  const segment = overlay.answer.segments[index];
  const [height, width] = overlay.answer.size;
  const numbers = `${describeNumbers(segment)} · ${share(segment.area / (height * width))} of the image`;
  tip.replaceChildren(swatch([segment.color]), element("strong", {}, segment.name), ` ${numbers}`);
  placeTip(tip, x, y);
}

// Puts the tip below a point, or above it, towards the middle of the stage and inside it.
function placeTip(tip, x, y) {
  const { clientWidth, clientHeight } = byId("stage");
  const { offsetWidth, offsetHeight } = tip;
  const left = x > clientWidth / 2 ? x - offsetWidth - TIP_GAP : x + TIP_GAP;
  const top = y + TIP_GAP + offsetHeight > clientHeight ? y - offsetHeight - TIP_GAP : y + TIP_GAP;
  tip.style.left = `${Math.max(0, Math.min(left, clientWidth - offsetWidth))}px`;
  tip.style.top = `${Math.max(0, top)}px`;
}

// States

function refreshRow(entry) {
  updateRow(entry, entry === queue.current, entry.answer && describeAnswer(entry.answer));
}

function refresh(entry) {
  refreshRow(entry);
  showProgress();
  if (entry === queue.current) showProblem(entry);
}

function showProgress() {
  const entry = queue.working;
  byId("progress").hidden = !entry;
  if (!entry) return;
  const seconds = Math.floor((performance.now() - queue.started) / 1000);
  const rest = queue.waiting.length ? `, ${queue.waiting.length} more waiting` : "";
  const doing = queue.isBusy ? "The service is busy; trying again" : `Segmenting ${entry.name}`;
  byId("progress-text").textContent = `${doing}… ${seconds} s${rest}`;
}

function showProblem(entry) {
  const box = byId("problem");
  box.hidden = !["failed", "cancelled"].includes(entry.state);
  if (box.hidden) return;
  const again = element("button", { type: "button" }, entry.state === "failed" ? "Try again" : "Segment");
  again.addEventListener("click", () => queue.restart([entry]));
  const kept = entry.answer ? " The previous result is shown." : "";
  if (entry.state === "cancelled") box.replaceChildren(element("p", {}, `Cancelled.${kept}`), again);
  else box.replaceChildren(element("h2", {}, `${entry.name} was not segmented.${kept}`), describeProblem(entry.problem), again);
  box.scrollIntoView({ block: "nearest" });
}

function describeProblem({ where, found, remedy, requestId }) {
  const rows = Object.entries({ Found: found, Where: where, "What to do": remedy, "Request id": requestId });
  const filled = rows.filter(([, text]) => text);
  return element("dl", {}, ...filled.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

// Start

async function start() {
  try {
    models = await fetchModels(() => (byId("status").textContent = "The models are being loaded…"));
  } catch (problem) {
    if (problem.status === 401) return askToken(hasToken());
    byId("problem").replaceChildren(element("h2", {}, "The page cannot use the service."), describeProblem(problem));
    byId("problem").hidden = false;
    byId("status").textContent = "";
    return;
  }
  byId("model").replaceChildren(...Object.keys(models).map((name) => element("option", { value: name }, name)));
  byId("model").disabled = byId("tasks").disabled = false;
  byId("status").textContent = "Ready";
  showModel();
  queue.work();
}

function askToken(wasRefused) {
  byId("token-problem").textContent = wasRefused ? "This token was refused." : "";
  byId("token").value = "";
  byId("token-dialog").showModal();
}

function connect() {
  const on = (id, type, action) => byId(id).addEventListener(type, action);
  for (const id of ["add", "choose"]) on(id, "click", () => byId("files").click());
  on("files", "change", ({ target }) => {
    addImages(target.files);
    target.value = ""; // so that the same file can be chosen again
  });
  on("samples", "click", ({ target }) => {
    const button = target.closest("[data-sample]");
    if (button) addSample(button.dataset.sample);
  });
  addEventListener("paste", (event) => addImages(event.clipboardData.files));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("stage").classList.add("over");
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? byId("stage").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    byId("stage").classList.remove("over");
    addImages(event.dataTransfer.files);
  });
  on("model", "change", () => {
    showModel();
    restart();
  });
  on("tasks", "change", () => {
    showTask();
    restart();
  });
  on("thresholds", "change", restart);
  on("opacity", "input", ({ target }) => overlay.setOpacity(target.value / 100));
  on("min-score", "input", filter);
  on("compare", "change", ({ target }) => byId("stage").classList.toggle("compare", target.checked));
  on("zoom-in", "click", () => stage.zoom(1.5));
  on("zoom-out", "click", () => stage.zoom(1 / 1.5));
  on("zoom-fit", "click", () => stage.fit());
  on("stage", "keydown", (event) => {
    const zooms = { "+": () => stage.zoom(1.5), "-": () => stage.zoom(1 / 1.5), 0: () => stage.fit() };
    if (!list.key(event)) zooms[event.key]?.();
  });
  on("cancel", "click", () => queue.cancel());
  on("save-json", "click", () => saveJson(queue.current));
  on("save-png", "click", () => {
    const picture = byId("stage").classList.contains("unseen") ? null : pictures[0];
    overlay.highlight([]);
    savePng(queue.current, picture, overlay.canvas);
    emphasize([]);
  });
  for (const type of ["load", "error"]) pictures[0].addEventListener(type, showPicture);
  on("token-dialog", "submit", (event) => {
    event.preventDefault();
    keepToken(byId("token").value);
    byId("token-dialog").close();
    start();
  });
  on("token-dialog", "cancel", () => (byId("status").textContent = "No token: reload the page to enter it."));
  setInterval(showProgress, 500);
}

connect();
start();
