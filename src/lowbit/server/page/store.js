// What the page remembers: the conversation and settings in this browser, the API key in this tab.
// A browser may forbid storage or run out of it; the page then forgets, and works.

const STORE = "lowbit";
const KEY = "lowbit-key";
export const DEFAULTS = { system: "", temperature: 0.7, top_p: 1, seed: null, max_tokens: 512, in_turn: true };

/** A turn is {question, answers}; an answer {model, text, status, figures, error, retryIn, progress}, where
 *  status is waiting, running, done, stopped or failed. models: the first and second choice. */
export const state = { turns: [], models: [], compare: false, theme: "", settings: { ...DEFAULTS } };

const isAnswer = (answer) => typeof answer.text === "string" && typeof answer.model === "string" && answer.figures instanceof Object;
const isTurn = (turn) => typeof turn.question === "string" && turn.answers.length > 0 && turn.answers.every(isAnswer);
// What is kept may be of another version, or damaged.
const VALID = {
  turns: (turns) => turns.every(isTurn),
  models: (models) => models.every((model) => typeof model === "string"),
  compare: (compare) => typeof compare === "boolean",
  theme: (theme) => ["", "light", "dark"].includes(theme),
  settings: (settings) => settings instanceof Object,
};

export function load() {
  for (const name of Object.keys(state)) {
    try {
      const kept = JSON.parse(localStorage.getItem(STORE))[name];
      if (VALID[name](kept)) state[name] = kept;
    } catch {
      // nothing kept, or nothing that could be used
    }
  }
  state.settings = { ...DEFAULTS, ...state.settings };
  for (const answer of state.turns.flatMap((turn) => turn.answers)) {
    if (answer.status === "running" || answer.status === "waiting") answer.status = "stopped";
    answer.retryIn = 0;
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
