import { element } from "./dom.js";

const ROWS = [
  ["stt", "Speech to text"],
  ["intent", "Intent"],
  ["rag", "Retrieval"],
  ["llm", "LLM first token"],
  ["clause", "First clause"],
  ["tts", "First audio"],
  ["overhead", "Overhead"],
  ["saved", "Saved ahead"],
];
const LABELS = new Map(ROWS);
/** Room behind the later of total and budget, as a share of the whole axis. */
const MARGIN = 1.06;

export function milliseconds(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  return `${value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en")} ms`;
}

/**
 * Where the stages of a latency breakdown lie, in milliseconds after the end of speech.
 *
 * Intent and retrieval run side by side. The first clause's wait includes the first token's. Whether retrieval stood
 * before the answer or was the answer itself shows in what total and overhead leave for it. What speculation saved lies
 * before the end of speech. Returns {rows: [{key, start, length}], segments, from, to, total, budget, within}.
 */
export function layOut(breakdown, defaultBudget) {
  const read = (name) => {
    const value = breakdown[`${name}_ms`];
    return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : null;
  };
  const stt = read("stt") ?? 0;
  const understood = read("intent_rag") ?? Math.max(read("intent") ?? 0, read("rag") ?? 0);
  const token = read("llm_first_token");
  const answer = read("first_clause") ?? token ?? 0;
  const speech = read("tts_first_chunk") ?? 0;
  const overhead = read("overhead") ?? 0;
  const total = read("total") ?? stt + understood + answer + speech + overhead;
  const before = Math.min(understood, Math.max(0, total - stt - overhead - answer - speech));
  const asked = stt + before;
  const spoken = asked + answer;
  const saved = read("saved") ?? 0;
  const budget = read("budget") ?? defaultBudget;
  const rows = [
    { key: "stt", start: 0, length: read("stt") },
    { key: "intent", start: stt, length: read("intent") },
    { key: "rag", start: stt, length: read("rag") },
    { key: "llm", start: asked, length: token },
    { key: "clause", start: asked, length: read("first_clause") },
    { key: "tts", start: spoken, length: read("tts_first_chunk") },
    { key: "overhead", start: Math.max(0, total - overhead), length: read("overhead") },
    { key: "saved", start: stt - saved, length: saved > 0 ? saved : null },
  ].filter(({ length }) => length !== null);
  const segments = [
    { key: "stt", start: 0, length: stt },
    { key: "rag", start: stt, length: before },
    { key: "llm", start: asked, length: Math.min(token ?? 0, answer) },
    { key: "clause", start: asked + Math.min(token ?? 0, answer), length: answer - Math.min(token ?? 0, answer) },
    { key: "tts", start: spoken, length: speech },
    { key: "overhead", start: Math.max(0, total - overhead), length: overhead },
  ].filter(({ length }) => length > 0);
  const from = Math.min(0, ...rows.map(({ start }) => start));
  const to = from + (Math.max(total, budget, ...rows.map(({ start, length }) => start + length)) - from) * MARGIN;
  const within = typeof breakdown.within_budget === "boolean" ? breakdown.within_budget : total <= budget;
  return { rows, segments, from, to, total, budget, within, brokenBy: breakdown.budget_broken_by };
}

function place(node, chart, start, length) {
  const share = (value) => `${(100 * value) / (chart.to - chart.from)}%`;
  node.style.setProperty("left", share(start - chart.from));
  if (length !== undefined) node.style.setProperty("width", share(length));
  return node;
}

function track(chart, spans) {
  const bars = spans.map(({ key, start, length }) => place(element("i", `bar ${key}`), chart, start, length));
  return element("span", "track", ...bars, place(element("i", "budget"), chart, chart.budget));
}

function verdict(chart) {
  if (chart.within) return `within ${milliseconds(chart.budget)}`;
  const stage = typeof chart.brokenBy === "string" ? `, by ${chart.brokenBy.replaceAll("_", " ")}` : "";
  return `${milliseconds(chart.total - chart.budget)} over ${milliseconds(chart.budget)}${stage}`;
}

/** A turn's latency: one bar against the budget, and one line per stage once it is opened. */
export class Waterfall {
  constructor() {
    this.summary = element("summary", "latency-summary");
    this.stages = element("ul", "stages");
    this.node = element("details", "latency", this.summary, this.stages);
    this.node.hidden = true;
    this.touched = false;
    this.summary.addEventListener("click", () => {
      this.touched = true;
    });
  }

  show(breakdown, defaultBudget) {
    if (breakdown === null || typeof breakdown !== "object" || typeof breakdown.total_ms !== "number") return;
    const chart = layOut(breakdown, defaultBudget);
    this.node.hidden = false;
    this.node.classList.toggle("over", !chart.within);
    this.node.dataset.totalMs = chart.total;
    this.summary.replaceChildren(
      element("strong", "total", milliseconds(chart.total)),
      track(chart, chart.segments),
      element("span", "verdict", verdict(chart)),
    );
    this.stages.replaceChildren(...chart.rows.map((row) => this.stage(chart, row)));
  }

  stage(chart, row) {
    const line = element(
      "li",
      "stage",
      element("span", "name", LABELS.get(row.key)),
      track(chart, [row]),
      element("span", "value", row.key === "saved" ? `−${milliseconds(row.length)}` : milliseconds(row.length)),
    );
    line.dataset.stage = row.key;
    return line;
  }

  /** Opens the newest and folds the one before, unless the user chose otherwise. */
  open(open) {
    if (!this.touched) this.node.open = open;
  }
}
