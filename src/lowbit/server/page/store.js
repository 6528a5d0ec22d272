// What the page remembers: the conversation and settings in this browser, the API key in this tab.
// A browser may forbid storage or run out of it; the page then forgets, and works.

const STORE = "lowbit";
const KEY = "lowbit-key";
export const DEFAULTS = { system: "", temperature: 0.7, top_p: 1, seed: null, max_tokens: 512, in_turn: true };

/** A turn is {question, answers}; an answer {model, text, status, figures, error, retryIn, progress}, where
 *  status is waiting, running, done, stopped or failed. models: the first and second choice. */
export const state = { turns: [], models: [], compare: false, theme: "", settings: { ...DEFAULTS } };

export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    for (const name of Object.keys(state)) if (typeof kept[name] === typeof state[name]) state[name] = kept[name];
    state.settings = { ...DEFAULTS, ...state.settings };
    for (const answer of state.turns.flatMap((turn) => turn.answers)) {
      if (answer.status === "running" || answer.status === "waiting") answer.status = "stopped";
      answer.retryIn = 0;
    }
  } catch {
    state.turns = [];
  }
}

export function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // full or forbidden
  }
}

export function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function keepKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // forbidden: kept until the page closes
  }
}
