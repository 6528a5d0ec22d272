// Turns on the page: a question, and one answer for each model asked, side by side.

import { bytes, h, icon, seconds, speed } from "./dom.js";
import { render } from "./markdown.js";

const button = (name, label, onclick) => h("button", { type: "button", class: "quiet", onclick }, icon(name), label);

/** Elements of `turn`. acts: {regenerate, edit(turn), retry(answer)}; info(model): its /stats entry or undefined. */
export function turnView(turn, number, acts, info) {
  const question = h("div", { class: "question", text: turn.question });
  const answers = h("div", { class: turn.answers.length > 1 ? "answers two" : "answers" });
  const verdict = h("p", { class: "verdict", hidden: true });
  const tools = h("div", { class: "tools" }, button("again", "Regenerate", acts.regenerate), button("edit", "Edit question", () => acts.edit(turn)));
  const root = h("article", { class: "turn", "aria-label": `Question ${number}` }, question, answers, verdict, tools);
  const views = turn.answers.map((answer, slot) => answerView(answer, slot, acts, info));
  answers.append(...views.map((view) => view.root));
  const update = () => {
    views.forEach((view) => view.update());
    parting(turn, verdict);
  };
  update();
  return { root, question, update };
}

function answerView(answer, slot, acts, info) {
  const text = h("div", { class: "text" });
  const figures = h("p", { class: "figures" });
  const wait = h("p", { class: "wait" });
  const error = h("div", { class: "error", role: "alert", hidden: true });
  const copy = button("copy", "Copy", () => navigator.clipboard?.writeText(answer.text));
  const model = info(answer.model);
  const what = model?.weights_bytes ? `${Number(model.bits_per_weight.toFixed(2))} bits, ${bytes(model.weights_bytes)}` : "";
  const name = h("h3", {}, h("i", { "aria-hidden": "true" }), h("b", { text: answer.model }), h("span", { text: what }));
  const head = h("div", { class: "head" }, name, copy);
  const root = h("section", { class: `answer ${"ab"[slot]}`, "aria-label": `Answer of ${answer.model}` }, head, text, wait, error, figures);
  let drawn = null;
  const update = () => {
    const busy = answer.status === "running" || answer.status === "waiting";
    root.setAttribute("aria-busy", String(busy));
    root.dataset.status = answer.status;
    if (drawn !== answer.text) render((drawn = answer.text), text);
    wait.textContent = answer.status === "waiting" ? "Waits for its turn" : answer.status === "running" && !answer.text ? answer.progress || "Reading the prompt" : "";
    figures.replaceChildren(...figureTexts(answer).map((part) => h("span", { class: part.endsWith("/s") && "speed", text: part })));
    copy.hidden = busy || !answer.text;
    const message = answer.error;
    error.hidden = !message;
    if (message && error.dataset.message !== message + answer.retryIn) {
      error.dataset.message = message + answer.retryIn;
      const label = answer.retryIn > 0 ? `Try again (by itself in ${answer.retryIn} s)` : "Try again";
      error.replaceChildren(h("p", { text: message }), button("again", label, () => acts.retry(answer)));
    }
  };
  return { root, update };
}

/** The figures under an answer, those that are known. */
function figureTexts({ status, figures: f }) {
  const parts = [];
  if (f?.rate) parts.push(`${speed(f.rate)} tokens/s`);
  if (f?.first) parts.push(`first token ${seconds(f.first)}`);
  if (f?.tokens) parts.push(`${f.tokens} tokens`);
  if (f?.cached) parts.push(`${f.cached} of ${f.prompt} prompt tokens cached`);
  else if (f?.prompt) parts.push(`${f.prompt} prompt tokens`);
  if (f?.drafts) parts.push(`${f.accepted} of ${f.drafts} drafts accepted`);
  if (f?.seed !== undefined && f.seed !== null) parts.push(`seed ${f.seed}`);
  if (status === "stopped") parts.push("stopped");
  if (f?.reason === "length") parts.push("cut at max tokens");
  return parts;
}

/** Where two finished answers part: seed and prompt are the same, so the weights alone make the difference. And
 *  which came faster, if each had the machine to itself and came long enough to tell. */
function parting({ answers }, node) {
  const [a, b] = answers;
  node.hidden = !(b && a.status === "done" && b.status === "done");
  if (node.hidden) return;
  const [left, right] = [a, b].map((answer) => answer.text.trim().split(/\s+/));
  let n = 0;
  while (n < left.length && n < right.length && left[n] === right[n]) n++;
  const same = n === left.length && n === right.length;
  const parted = n ? `The answers part after ${n} ${n === 1 ? "word" : "words"}.` : "The answers part at the first word.";
  const [slow, fast] = [a, b].sort((x, y) => x.figures.rate - y.figures.rate);
  const told = [a, b].every(({ figures }) => figures.alone && figures.tokens >= 16 && figures.rate);
  const ratio = fast.figures.rate / slow.figures.rate;
  const faster = !told ? "" : ratio < 1.03 ? " Both were as fast." : ` ${fast.model} was ${ratio.toFixed(2)} times as fast.`;
  node.textContent = (same ? "Both answers are the same." : parted) + faster;
}
