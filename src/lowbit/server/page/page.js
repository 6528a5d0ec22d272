// The page: one conversation with one model or two.

import { $, h } from "./dom.js";
import { describe, pollNow, watch } from "./gauges.js";
import { DEFAULTS, keepKey, load, readKey, save, state } from "./store.js";
import { ServerError, ask, stream } from "./stream.js";
import { turnView } from "./view.js";

const TRIES = 3;
const EXAMPLES = ["What is a language model?", "Explain why the sky is blue to a child.", "Write a haiku about small numbers."];

let views = [];
let known = new Map(); // id -> entry of /stats
let available = [];
let running = null; // AbortController of the answers that come now
let editing = null; // turn whose question is in the composer
let key = readKey();

const announce = (text) => ($("announce").textContent = text);

function notice(text) {
  $("notice").hidden = !text;
  if ($("notice").textContent !== text) $("notice").textContent = text;
}

// Models

const chosen = () => (state.compare && available.length > 1 ? state.models.slice(0, 2) : state.models.slice(0, 1));

async function readModels() {
  try {
    available = (await (await ask("v1/models", { key })).json()).data.map((model) => model.id);
  } catch (error) {
    refused(error);
    return;
  }
  $("key-form").hidden = true;
  notice("");
  const first = available.includes(state.models[0]) ? state.models[0] : available[0];
  const second = available.includes(state.models[1]) ? state.models[1] : available.find((id) => id !== first);
  state.models = [first, second ?? first];
  for (const [slot, select] of [$("model-a"), $("model-b")].entries()) {
    select.replaceChildren(...available.map((id) => h("option", { value: id, text: id })));
    select.value = state.models[slot];
  }
  $("compare").hidden = available.length < 2;
  showModels();
}

function showModels() {
  const two = chosen().length > 1;
  $("compare").setAttribute("aria-pressed", String(two));
  $("pick-b").hidden = !two;
  for (const node of document.querySelectorAll("[data-model]")) node.classList.toggle("b", two && node.dataset.model === state.models[1] && state.models[0] !== state.models[1]);
  const lines = chosen().map((id) => (known.has(id) ? `${id}: ${describe(known.get(id))}` : id));
  $("welcome-models").textContent = `${lines.join(" beside ")}. What you write goes to this server only.`;
}

function refused(error) {
  if (error.status === 401) {
    if ($("key-form").hidden) {
      $("key-form").hidden = false;
      $("key").focus();
    }
    if (key) notice(error.message);
  } else notice(error.message);
}

// The conversation

function draw() {
  $("welcome").hidden = state.turns.length > 0;
  const acts = { regenerate: () => regenerate(), edit, retry };
  views = state.turns.map((turn, i) => turnView(turn, i + 1, acts, (id) => known.get(id)));
  $("turns").replaceChildren(...views.map((view) => view.root));
  views.at(-1)?.root.classList.add("last");
  if (editing) views.at(-1)?.root.classList.add("editing");
  follow(true);
}

let frame = 0;
function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const stick = atEnd();
    views.at(-1)?.update();
    follow(stick);
  });
}

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
const follow = (stick) => stick && ($("scroll").scrollTop = $("scroll").scrollHeight);

function busy(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  document.body.classList.toggle("busy", Boolean(controller));
}

/** A fresh seed for a turn unless one is set; both models get the same. */
const drawSeed = () => state.settings.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];

function newAnswers() {
  const seed = drawSeed();
  return chosen().map((model) => ({ model, text: "", status: "waiting", figures: { seed }, error: "", retryIn: 0 }));
}

async function submit(question) {
  if (running || !available.length || !$("settings").reportValidity()) return;
  if (editing) state.turns.pop();
  editing = null;
  state.turns.push({ question, answers: newAnswers() });
  draw();
  await run(state.turns.at(-1).answers);
}

async function regenerate() {
  if (running || !available.length || !$("settings").reportValidity()) return;
  state.turns.at(-1).answers = newAnswers();
  draw();
  await run(state.turns.at(-1).answers);
}

async function retry(answer) {
  if (running) {
    if (answer.retryIn) answer.retryIn = 1;
    hurry.get(answer)?.();
    return;
  }
  Object.assign(answer, { text: "", status: "waiting", error: "", retryIn: 0 });
  await run([answer]);
}

/** Let `answers` of the last turn come, together or one after the other. */
async function run(answers) {
  const controller = new AbortController();
  busy(controller);
  announce("Answering");
  redraw();
  try {
    if (state.settings.in_turn) for (const answer of answers) await complete(answer, controller.signal);
    else await Promise.all(answers.map((answer) => complete(answer, controller.signal)));
  } finally {
    busy(null);
    save();
    redraw();
  }
  announce(answers.map((answer) => `${answer.model}: ${answer.error || answer.text}`).join(". "));
}

/** One answer, tried again after as long as the server asks while it is busy. */
async function complete(answer, signal) {
  for (let tries = 1; ; tries++) {
    if (signal.aborted) answer.status = "stopped";
    if (answer.status === "stopped") return;
    Object.assign(answer, { text: "", status: "running", error: "", retryIn: 0, progress: "" });
    try {
      await receive(answer, signal);
      answer.status = "done";
      return;
    } catch (error) {
      if (error.name === "AbortError") {
        answer.status = "stopped";
        return;
      }
      Object.assign(answer, { status: "failed", error: error.message });
      if (error.status === 401) refused(error);
      if (!(error instanceof ServerError) || error.retryAfter === null || tries === TRIES || answer.text) return;
      for (answer.retryIn = Math.max(1, Math.ceil(error.retryAfter)); answer.retryIn > 0; answer.retryIn--) {
        redraw();
        await paused(answer, signal);
        if (signal.aborted) break;
      }
      if (signal.aborted) {
        answer.retryIn = 0;
        return;
      }
    } finally {
      redraw();
    }
  }
}

const hurry = new Map(); // answer -> what ends its pause

/** A second, or less if the user will not wait. */
const paused = (answer, signal) =>
  new Promise((resolve) => {
    hurry.set(answer, resolve);
    signal.addEventListener("abort", resolve, { once: true });
    setTimeout(resolve, 1000);
  });

/** The request for `answer`: [path, body]. A model without chat template continues the question's text. */
function request(answer) {
  const { temperature, top_p, max_tokens, system } = state.settings;
  const body = { model: answer.model, temperature, top_p, seed: answer.figures.seed, return_progress: true };
  if (max_tokens) body.max_tokens = max_tokens;
  const last = state.turns.at(-1);
  if (known.get(answer.model)?.chat === false) return ["v1/completions", { ...body, prompt: last.question }];
  const slot = Math.max(last.answers.indexOf(answer), 0);
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of state.turns.slice(0, -1)) {
    const text = (turn.answers[slot] ?? turn.answers[0]).text;
    if (text) messages.push({ role: "user", content: turn.question }, { role: "assistant", content: text });
  }
  return ["v1/chat/completions", { ...body, messages: [...messages, { role: "user", content: last.question }] }];
}

async function receive(answer, signal) {
  const [path, body] = request(answer);
  const figures = (answer.figures = { seed: answer.figures.seed, alone: state.settings.in_turn });
  const start = performance.now();
  let first = 0;
  let pieces = 0;
  for await (const event of stream(path, { key, body, signal })) {
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    const now = performance.now();
    if (text) {
      pieces++;
      first ||= now;
      answer.text += text;
      figures.first = (first - start) / 1000;
      figures.tokens = event.usage?.completion_tokens ?? pieces;
      if (now > first) figures.rate = ((figures.tokens - 1) / (now - first)) * 1000;
    }
    if (choice?.finish_reason) figures.reason = choice.finish_reason;
    const read = event.prompt_progress;
    if (read) answer.progress = `Reading the prompt: ${Math.round((100 * read.processed) / read.total)}%`;
    if (event.usage) measured(figures, event.usage);
    if (event.timings?.tokens_per_second) figures.rate = event.timings.tokens_per_second;
    redraw();
  }
}

/** What the server counted replaces what the page could see. */
function measured(figures, usage) {
  figures.prompt = usage.prompt_tokens;
  figures.tokens = usage.completion_tokens;
  figures.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const guesses = usage.completion_tokens_details ?? {};
  figures.accepted = guesses.accepted_prediction_tokens ?? 0;
  figures.drafts = figures.accepted + (guesses.rejected_prediction_tokens ?? 0);
}

function edit(turn) {
  if (running) return;
  editing = turn;
  $("question").value = turn.question;
  views.at(-1).root.classList.add("editing");
  fit();
  $("question").focus();
  announce("Editing the last question. Escape leaves it as it was.");
}

function stopEditing() {
  editing = null;
  views.at(-1)?.root.classList.remove("editing");
  $("question").value = "";
  fit();
}

// Controls

function fit() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 240)}px`;
  $("send").disabled = !box.value.trim();
}

function applyTheme() {
  document.documentElement.dataset.theme = state.theme;
}

function connectSettings() {
  const form = $("settings");
  for (const name of Object.keys(DEFAULTS)) {
    const field = $(name);
    if (field.type === "checkbox") field.checked = state.settings[name];
    else field.value = state.settings[name] ?? "";
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    for (const name of Object.keys(DEFAULTS)) {
      const field = $(name);
      if (field.type === "checkbox") state.settings[name] = field.checked;
      else if (field.type !== "number") state.settings[name] = field.value;
      else if (field.validity.valid) state.settings[name] = field.value === "" ? null : Number(field.value);
    }
    save();
  });
}

function connect() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || running) return;
    $("question").value = "";
    fit();
    submit(question);
  });
  // Before the browser breaks the streams off, which would look like an error of the server.
  for (const leaving of ["beforeunload", "pagehide"]) {
    addEventListener(leaving, () => {
      running?.abort();
      save();
    });
  }
  $("question").addEventListener("input", fit);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("composer").requestSubmit();
    } else if (event.key === "ArrowUp" && !$("question").value && state.turns.length) {
      event.preventDefault();
      edit(state.turns.at(-1));
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running) running.abort();
    else if (editing) stopEditing();
    else showPanel(false);
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    running?.abort();
    state.turns = [];
    if (editing) stopEditing();
    save();
    draw();
    announce("Conversation cleared");
    $("question").focus();
  });
  for (const [slot, id] of ["model-a", "model-b"].entries()) {
    $(id).addEventListener("change", () => {
      state.models[slot] = $(id).value;
      save();
      showModels();
    });
  }
  $("compare").addEventListener("click", () => {
    state.compare = !state.compare;
    save();
    showModels();
  });
  $("theme").addEventListener("click", () => {
    const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    state.theme = dark ? "light" : "dark";
    applyTheme();
    save();
  });
  $("panel-button").addEventListener("click", () => showPanel(!document.body.classList.contains("panel")));
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    keepKey(key);
    readModels().then(pollNow);
  });
  $("examples").append(...EXAMPLES.map((text) => h("button", { type: "button", onclick: () => submit(text) }, text)));
}

function showPanel(open) {
  document.body.classList.toggle("panel", open);
  $("panel-button").setAttribute("aria-expanded", String(open));
}

let told = "";
watch(
  () => key,
  (stats, error) => {
    if (!stats) {
      refused(error);
      return;
    }
    known = new Map(stats.models.map((model) => [model.id, model]));
    const ids = stats.models.map((model) => model.id + model.weights_bytes).join("\n");
    if (ids !== told || !available.length) readModels().then(() => running || draw());
    told = ids;
    if (available.length) notice("");
    $("key-form").hidden = true;
  },
);

load();
applyTheme();
connectSettings();
connect();
draw();
fit();
