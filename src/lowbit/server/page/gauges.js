// The server panel: GET /stats once a second while the page is seen, drawn as gauges.

import { $, bytes, h, seconds, speed } from "./dom.js";
import { ask } from "./stream.js";

const SAMPLES = 60;
const rates = [];
const cards = new Map();
let last = null;
let poll = () => {};

/** Poll for ever. key(): the API key; seen(stats or null, error): told after every poll. */
export async function watch(key, seen) {
  for (;;) {
    let pause = 1000;
    if (!document.hidden) {
      let stats = null;
      let failure = null;
      try {
        stats = await (await ask("stats", { key: key() })).json();
      } catch (error) {
        failure = error;
        pause = 2000;
      }
      if (stats) draw(stats);
      else down(failure);
      seen(stats, failure);
    }
    await new Promise((resolve) => {
      poll = resolve;
      setTimeout(resolve, pause);
    });
  }
}

/** Poll now, not in a second. */
export const pollNow = () => poll();

function down(error) {
  last = null;
  state(error.status === 401 ? "wants a key" : "no answer", "bad");
}

function state(text, kind) {
  const node = $("state");
  if (node.textContent !== text) node.textContent = text;
  node.className = kind;
}

function draw(stats) {
  const dead = stats.models.filter((model) => !model.engine);
  if (stats.draining) state("finishing, then stopping", "warn");
  else if (dead.length) state(`${dead.map((model) => model.id).join(", ")} starting`, "warn");
  else state("ready", "good");

  const now = performance.now();
  const total = stats.models.reduce((sum, model) => sum + (model.engine?.generated_tokens ?? 0), 0);
  if (last && now > last.now) rates.push(Math.max(0, ((total - last.total) / (now - last.now)) * 1000));
  last = { now, total };
  if (rates.length > SAMPLES) rates.shift();
  $("rate").textContent = speed(rates.at(-1) || 0).replace(/^0\.0$/, "0");
  sparkline();

  for (const id of [...cards.keys()].filter((id) => !stats.models.some((model) => model.id === id))) {
    cards.get(id).root.remove();
    cards.delete(id);
  }
  for (const model of stats.models) {
    if (!cards.has(model.id)) {
      cards.set(model.id, card(model));
      $("engines").append(cards.get(model.id).root);
    }
    update(cards.get(model.id), model);
  }
}

function sparkline() {
  const top = Math.max(...rates, 1) * 1.08;
  const points = rates.map((rate, i) => `${(((SAMPLES - rates.length + i) * 120) / (SAMPLES - 1)).toFixed(1)},${(35 - (rate / top) * 33).toFixed(1)}`);
  const [area, line] = $("spark").children;
  line.setAttribute("points", points.join(" "));
  const left = points.length ? points[0].split(",")[0] : 0;
  area.setAttribute("points", points.length > 1 ? `${left},36 ${points.join(" ")} 120,36` : "");
}

/** The elements of one model's card. */
function card(model) {
  const bar = h("i");
  const cached = h("i", { class: "cached" });
  const kv = h("div", { class: "meter", role: "meter", "aria-label": `KV cache of ${model.id}, ${model.kv_bits} bits`, "aria-valuemin": 0, "aria-valuemax": 100 }, bar, cached);
  const parts = { bar, cached, kv, what: h("p", { class: "what" }), kvText: h("span"), queue: h("p", { class: "queue" }), more: h("dl") };
  parts.root = h("article", { class: "engine", "data-model": model.id },
    h("h3", { text: model.id }),
    parts.what,
    h("p", { class: "label" }, `KV, ${model.kv_bits} bits`, parts.kvText),
    kv,
    parts.queue,
    h("details", {}, h("summary", { text: "Since it started" }), parts.more),
  );
  return parts;
}

/** "int4-g32, 5.01 bits/weight, 84.4 MB" */
export const describe = (model) =>
  !model.weights_bytes ? `${model.format}, loading` : `${model.format}, ${Number(model.bits_per_weight.toFixed(2))} bits/weight, ${bytes(model.weights_bytes)}`;

function update(parts, model) {
  const engine = model.engine;
  parts.root.classList.toggle("down", !engine);
  parts.what.textContent = describe(model);
  if (!engine) {
    parts.queue.textContent = "The engine is starting.";
    return;
  }
  const share = (blocks) => (engine.kv_blocks_total ? (100 * blocks) / engine.kv_blocks_total : 0);
  const cached = share(engine.kv_blocks_cached);
  const used = share(engine.kv_blocks_used) - cached;
  parts.bar.style.width = `${used}%`;
  parts.cached.style.width = `${cached}%`;
  parts.kv.setAttribute("aria-valuenow", used.toFixed(0));
  const percent = (value) => `${value > 0 && value < 9.95 ? value.toFixed(1) : value.toFixed(0)}%`;
  const text = `${percent(used)} used, ${percent(cached)} cached`;
  parts.kv.setAttribute("aria-valuetext", text);
  parts.kvText.textContent = text;
  parts.kv.title = `${engine.kv_tokens_total} tokens in ${engine.kv_blocks_total} blocks`;
  parts.queue.replaceChildren(h("b", { text: engine.running }), " running ", h("b", { text: engine.waiting }), " waiting");
  const part = (some, whole) => (whole ? percent((100 * some) / whole) : "none");
  const spread = (times) => (times.count ? `${seconds(times.p50)}, 95%: ${seconds(times.p95)}` : "none");
  const rows = [
    ["First token", spread(model.first_token_seconds)],
    ["Between tokens", spread(model.between_tokens_seconds)],
    ["In the queue", spread(model.queue_seconds)],
    ["Prompt cached", part(engine.prefix_hit_tokens, engine.prefix_asked_tokens)],
    ["Drafts accepted", part(engine.accepted_tokens, engine.drafted_tokens)],
    ["Preemptions", engine.preemptions],
    ["Restarts", model.restarts],
  ];
  parts.more.replaceChildren(...rows.flatMap(([name, value]) => [h("dt", { text: name }), h("dd", { text: value })]));
}
