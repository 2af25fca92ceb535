import { asText, atEnd, element } from "./dom.js";
import { Waterfall, milliseconds } from "./waterfall.js";

/** Turns kept on the page; the oldest go first. */
const MAX_TURNS = 200;

/** The index in `full` behind the words of `heard`, whatever white space stands between them. */
export function heardLength(full, heard) {
  let at = 0;
  for (const word of heard.split(/\s+/).filter(Boolean)) {
    while (at < full.length && /\s/.test(full[at])) at += 1;
    at += Math.min(word.length, full.length - at);
  }
  while (at < full.length && /\s/.test(full[at])) at += 1;
  return at;
}

function confidence(value) {
  return typeof value === "number" && Number.isFinite(value) ? ` ${Math.round(value * 100)} %` : "";
}

class Turn {
  constructor(number, userText) {
    this.number = number;
    this.clauses = [];
    this.whole = null;
    this.heard = null;
    this.notes = new Map();
    this.user = element("p", "bubble user", userText);
    this.user.hidden = userText === "";
    this.agent = element("p", "bubble agent");
    this.agent.hidden = true;
    this.meta = element("ul", "meta");
    this.waterfall = new Waterfall();
    this.node = element("li", "turn", this.user, this.agent, this.meta, this.waterfall.node);
    this.node.dataset.turn = number;
  }

  get text() {
    return this.whole ?? this.clauses.filter(Boolean).join(" ");
  }

  note(key, kind, text) {
    this.notes.set(key, element("li", `note ${kind}`, text));
    this.meta.replaceChildren(...this.notes.values());
  }

  draw() {
    const text = this.text;
    this.agent.hidden = text === "";
    if (this.heard === null) {
      this.agent.replaceChildren(text);
      return;
    }
    const cut = heardLength(text, this.heard);
    const rest = element("span", "unheard", text.slice(cut));
    rest.title = "not heard: the answer was interrupted";
    this.agent.replaceChildren(text.slice(0, cut), rest);
  }
}

/** The conversation as bubbles, with what is being said right now at its end. */
export class Conversation {
  constructor({ scroller, turns, draft, draftText, thinking, thinkingStage, welcome }) {
    Object.assign(this, { scroller, draft, draftText, thinking, thinkingStage, welcome });
    this.list = turns;
    this.turns = new Map();
    this.latest = null;
    this.unnumbered = null;
    this.typed = "";
  }

  clear() {
    this.turns.clear();
    this.latest = null;
    this.unnumbered = null;
    this.typed = "";
    this.list.replaceChildren();
    this.setDraft("");
    this.setThinking(false);
    this.welcome.hidden = false;
  }

  /** The server counts from the start again: what is shown stays, and its numbers mean nothing any more. */
  forgetNumbers() {
    this.turns.clear();
    this.unnumbered = null;
  }

  /** Runs `change`, and stays at the end if that is where the user was. */
  keepEnd(change) {
    const follow = atEnd(this.scroller);
    change();
    if (follow) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  setDraft(text) {
    this.keepEnd(() => {
      this.draftText.textContent = text;
      this.draft.hidden = text === "";
      if (text !== "") this.welcome.hidden = true;
    });
  }

  setThinking(on, stage = "") {
    this.keepEnd(() => {
      this.thinking.hidden = !on;
      this.thinkingStage.textContent = stage;
    });
  }

  /** The utterance is over and nothing answers it: it becomes a turn of its own. */
  sealDraft() {
    if (this.draftText.textContent !== "") this.ensure(null);
  }

  ensure(number) {
    const known = this.turns.get(number) ?? this.adopt(number);
    if (known !== undefined) return known;
    const turn = new Turn(number ?? "", this.draftText.textContent || this.typed);
    this.typed = "";
    this.setDraft("");
    this.welcome.hidden = true;
    if (number === null) this.unnumbered = turn;
    else this.turns.set(number, turn);
    this.latest?.waterfall.open(false);
    this.latest = turn;
    this.keepEnd(() => {
      this.list.append(turn.node);
      while (this.list.children.length > MAX_TURNS) {
        this.turns.delete(Number(this.list.firstElementChild.dataset.turn));
        this.list.firstElementChild.remove();
      }
    });
    return turn;
  }

  /** A turn sealed before its number was known, if this is the number. */
  adopt(number) {
    const turn = this.unnumbered;
    this.unnumbered = null;
    if (turn === null || number === null || this.draftText.textContent !== "" || this.typed !== "") return undefined;
    turn.number = number;
    turn.node.dataset.turn = number;
    this.turns.set(number, turn);
    return turn;
  }

  respond(message, budget) {
    const turn = this.ensure(message.turn_number);
    this.setThinking(false);
    this.keepEnd(() => {
      turn.clauses[0] = asText(message.text);
      const intent = asText(message.intent);
      if (intent) turn.note("intent", "quiet", `${intent.replaceAll("_", " ")}${confidence(message.confidence)}`);
      if (message.audio === false) turn.note("audio", "warn", "text only, no speech");
      turn.waterfall.show(message.latency_breakdown, budget);
      turn.waterfall.open(turn === this.latest);
      turn.draw();
    });
  }

  addClause(message) {
    const turn = this.turns.get(message.turn_number);
    if (turn === undefined || !Number.isInteger(message.index) || message.index < 0 || message.index > 10000) return;
    this.keepEnd(() => {
      turn.clauses[message.index] = asText(message.text);
      turn.draw();
    });
  }

  complete(message, budget) {
    if (!this.turns.has(message.turn_number) && message.state === "LISTENING") return;
    const turn = this.ensure(message.turn_number);
    this.keepEnd(() => {
      if (typeof message.text === "string" && message.text !== "") turn.whole = message.text;
      if (message.cancelled && turn.heard === null) {
        turn.note("cancelled", "warn", "stopped");
        if (typeof message.heard_text === "string") turn.heard = message.heard_text;
      }
      if (message.truncated) turn.note("truncated", "warn", "the answer broke off");
      const degraded = Array.isArray(message.degraded) ? message.degraded : [];
      for (const stage of degraded) turn.note(`degraded ${asText(stage)}`, "warn", `without ${asText(stage)}`);
      turn.waterfall.show(message.latency_breakdown, budget);
      turn.draw();
    });
  }

  interrupted(message) {
    const turn = this.turns.get(message.turn_number);
    if (turn === undefined) return;
    this.keepEnd(() => {
      if (typeof message.heard_text === "string") turn.heard = message.heard_text;
      const stop = typeof message.stop_latency_ms === "number" ? `, stopped in ${milliseconds(message.stop_latency_ms)}` : "";
      const played = typeof message.played_ms === "number" ? ` after ${(message.played_ms / 1000).toFixed(1)} s` : "";
      turn.note("interrupted", "warn", `interrupted${played}${stop}`);
      turn.draw();
    });
  }

  /** A line between the bubbles; an error of a turn whose utterance is still open closes that utterance first. */
  line(kind, text, turnNumber) {
    if (Number.isInteger(turnNumber) && this.draftText.textContent !== "") this.ensure(turnNumber);
    this.welcome.hidden = true;
    const node = element("li", `line ${kind}`, text);
    if (kind === "error") node.setAttribute("role", "alert");
    this.keepEnd(() => this.list.append(node));
  }
}
