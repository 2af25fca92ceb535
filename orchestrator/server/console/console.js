import { AudioEngine, AudioUnavailable, NO_AUDIO, audioPossible } from "./audio.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { asText, element } from "./dom.js";
import { isSessionId, newSessionId } from "./session-id.js";
import { milliseconds } from "./waterfall.js";

const MAX_TEXT_BYTES = 4096;
const DEFAULT_RATE = 24000;
const LOWEST_RATE = 8000;
const HIGHEST_RATE = 192000;
const DEFAULT_BUDGET_MS = 445;
const ACTIVITY_LINES = 200;
/** A press longer than this mutes only while it lasts. */
const HOLD_MS = 350;
/** INTERRUPT lasts less than a millisecond; it is shown this long. */
const INTERRUPT_SHOWN_MS = 1200;
const STATES = ["IDLE", "LISTENING", "THINKING", "SPEAKING", "INTERRUPT"];
/** Speech has little energy; the square root makes a quiet voice visible. */
const loudness = (level) => Math.min(1, Math.sqrt(level));

const byId = (id) => document.getElementById(id);
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));

const parameters = new URLSearchParams(location.search);
const session = { id: "", state: "", turn: null, budget: DEFAULT_BUDGET_MS, rate: DEFAULT_RATE, reconnects: -1 };
/** The turn whose audio the next binary frame belongs to; null while none is to be played. */
let audioTurn = null;
let talking = false;
let muted = false;
let standingHint = "";

const conversation = new Conversation({
  scroller: ui.scroller,
  turns: ui.turns,
  draft: ui.draft,
  draftText: byId("draft-text"),
  thinking: ui.thinking,
  thinkingStage: byId("thinking-stage"),
  welcome: ui.welcome,
});
const connection = new Connection(new URL("orchestrate", document.baseURI.replace(/^http/, "ws")), {
  onMessage: (message) => receive(message),
  onAudio: (pcm) => audioTurn !== null && audio.push(audioTurn, session.rate, pcm),
  onStatus: (status) => showStatus(status),
  onRoundTrip: (elapsed) => write("round-trip", milliseconds(elapsed)),
});
const audio = new AudioEngine({
  onReport: ({ turn, playedMs, ended }) =>
    connection.send({ type: "playback", turn_number: turn, played_ms: Math.round(playedMs * 10) / 10, ended }),
  onPlaying: (playing) => showPlaying(playing),
  onMicrophone: (pcm) => connection.sendAudio(pcm),
  onLevel: (level) => showMicrophoneLevel(level),
  onMicrophoneLost: (text) => {
    stopTalking();
    hint(text);
  },
});

function write(id, text) {
  byId(id).textContent = text;
}

/** One line above the composer; an empty one gives way to what holds for the whole visit. */
function hint(text) {
  ui.hint.textContent = text || standingHint;
}

function log(kind, text) {
  const time = new Date().toLocaleTimeString("en-GB");
  ui.activity.prepend(element("li", kind, element("time", "", time), element("span", "", text)));
  while (ui.activity.children.length > ACTIVITY_LINES) ui.activity.lastElementChild.remove();
}

const RECEIVERS = {
  connected(message) {
    session.reconnects += 1;
    dropAudio();
    if (!message.resumed && session.reconnects > 0) {
      conversation.forgetNumbers();
      conversation.line("quiet", "The server did not know this conversation any more; it starts anew.");
    } else if (message.resumed && session.reconnects === 0 && message.turn_number > 0) {
      conversation.line("quiet", `The conversation goes on after turn ${asText(message.turn_number)}.`);
    }
    session.turn = message.turn_number;
    if (typeof message.budget_ms === "number") session.budget = message.budget_ms;
    takeFormat(message.audio_format);
    const place = [message.slot !== undefined ? `slot ${asText(message.slot)}` : "", asText(message.node)];
    write("served-by", place.filter(Boolean).join(" on ") || "–");
    write("turn-number", asText(message.turn_number));
    write("budget", milliseconds(session.budget));
    write("reconnects", String(session.reconnects));
    log("good", message.resumed ? "conversation resumed" : "connected");
    enter(message.state);
  },
  state_update(message) {
    const pieces = Array.isArray(message.text_buffer) ? message.text_buffer : [];
    conversation.setDraft(pieces.map(asText).filter(Boolean).join(" "));
    enter(message.state);
  },
  response_ready(message) {
    announceTurn(message.turn_number);
    takeFormat(message.audio_format);
    audioTurn = message.turn_number;
    conversation.respond(message, session.budget);
    hint(audio.silenced ? "The browser holds the sound back: click anywhere to hear the answer." : "");
  },
  response_text(message) {
    conversation.addClause(message);
  },
  turn_complete(message) {
    announceTurn(message.turn_number);
    if (message.cancelled) dropAudio();
    else audio.finish(message.turn_number);
    if (audioTurn === message.turn_number) audioTurn = null;
    conversation.complete(message, session.budget);
    const outcome = message.cancelled ? "stopped" : message.truncated ? "broke off" : "complete";
    log("quiet", `turn ${asText(message.turn_number)} ${outcome}, ${milliseconds(message.latency_breakdown?.total_ms)}`);
    enter(message.state);
  },
  interrupted(message) {
    dropAudio();
    conversation.interrupted(message);
    log("warn", `interrupted after ${milliseconds(message.played_ms)}, stopped in ${milliseconds(message.stop_latency_ms)}`);
  },
  notice(message) {
    hint(asText(message.message) || asText(message.code));
    log("quiet", `${asText(message.code)}: ${asText(message.message)}`);
  },
  error(message) {
    if (message.code === "illegal_event") {
      RECEIVERS.notice(message);
      return;
    }
    const again = message.retryable ? " You can try again." : "";
    conversation.line("error", `${asText(message.message) || asText(message.code)}${again}`, message.turn_number);
    log("bad", `${asText(message.code)}: ${asText(message.message)}`);
  },
  draining(message) {
    log("warn", "the server is restarting; the conversation moves on by itself");
    connection.draining(Number(message.reconnect_after_ms) || 0, () => session.state === "IDLE");
  },
  state_change(message) {
    const waited = typeof message.latency_ms === "number" ? `, after ${milliseconds(message.latency_ms)}` : "";
    log("quiet", `${asText(message.from)} → ${asText(message.to)} by ${asText(message.trigger)}${waited}`);
    enter(message.to);
  },
  processing(message) {
    conversation.setThinking(session.state === "THINKING", asText(message.stage).replaceAll("_", " "));
  },
};

function receive(message) {
  if (Object.hasOwn(RECEIVERS, message.type)) RECEIVERS[message.type](message);
}

function takeFormat(format) {
  const rate = format?.sample_rate;
  if (Number.isInteger(rate) && rate >= LOWEST_RATE && rate <= HIGHEST_RATE) session.rate = rate;
}

function announceTurn(number) {
  session.turn = number;
  write("turn-number", asText(number));
}

function dropAudio() {
  audioTurn = null;
  audio.flush();
}

function enter(state) {
  if (!STATES.includes(state)) return;
  session.state = state;
  for (const item of ui.states.children) {
    const here = item.dataset.state === state;
    item.classList.toggle("here", here);
    if (here) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
    if (here && state === "INTERRUPT") {
      item.classList.add("flash");
      setTimeout(() => item.classList.remove("flash"), INTERRUPT_SHOWN_MS);
    }
  }
  conversation.setThinking(state === "THINKING");
  if (state === "IDLE") conversation.sealDraft();
  showStop();
}

const PHASE_TEXT = { connecting: "Connecting", open: "Connected", waiting: "Reconnecting", stopped: "Disconnected" };

function showStatus({ phase, text, code, retryInMs }) {
  ui.connection.dataset.phase = phase;
  write("connection-text", PHASE_TEXT[phase] ?? "Disconnected");
  if (phase === "open") {
    ui.banner.hidden = true;
    showStop();
    return;
  }
  if (phase === "connecting") return;
  log("warn", `${text}${code ? ` (${code})` : ""}`);
  if (code === 1003) {
    stopTalking();
    hint(text);
  }
  audioTurn = null;
  conversation.setThinking(false);
  showStop();
  const wait = retryInMs === null ? "" : ` Trying again in ${(retryInMs / 1000).toFixed(1)} s.`;
  const action = { waiting: "Try now", stopped: "Connect again", expired: "New conversation" }[phase];
  showBanner(`${text}${phase === "waiting" ? wait : ""}`, action, phase === "token");
}

function showBanner(text, action, asksForToken) {
  write("banner-text", text);
  byId("token-form").hidden = !asksForToken;
  byId("banner-action").hidden = action === undefined;
  byId("banner-action").textContent = action ?? "";
  ui.banner.hidden = false;
}

function beginSession(id) {
  session.id = id;
  session.reconnects = -1;
  write("session-id", id);
  const address = new URL(location.href);
  address.searchParams.set("session_id", id);
  history.replaceState(null, "", address);
  connection.begin(id, parameters.get("token") ?? "");
}

function renew() {
  dropAudio();
  conversation.clear();
  session.state = "";
  hint("");
  beginSession(newSessionId());
}

byId("banner-action").addEventListener("click", () => {
  if (connection.phase === "expired" || !isSessionId(session.id)) renew();
  else connection.connect();
});
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = ui.token.value.trim();
  if (token === "") return;
  ui.token.value = "";
  connection.token = token;
  connection.connect();
});
ui.renew.addEventListener("click", renew);

async function startTalking() {
  ui.talk.disabled = true;
  hint("");
  try {
    await audio.openMicrophone();
    talking = true;
  } catch (error) {
    if (!(error instanceof AudioUnavailable)) throw error;
    hint(error.message);
  } finally {
    ui.talk.disabled = false;
    showTalking();
  }
}

function stopTalking() {
  talking = false;
  audio.closeMicrophone();
  setMuted(false);
  showMicrophoneLevel(0);
  showTalking();
}

function setMuted(value) {
  muted = value;
  audio.mute(muted);
  showTalking();
}

function showTalking() {
  ui.talk.setAttribute("aria-pressed", String(talking));
  ui.talk.classList.toggle("muted", muted);
  write("talk-text", talking ? "End talking" : "Start talking");
  ui.mute.hidden = !talking;
  ui.mute.setAttribute("aria-pressed", String(muted));
  ui.mute.textContent = muted ? "Unmute" : "Mute";
  write("microphone-state", !talking ? "off" : muted ? "muted" : "on");
}

function showMicrophoneLevel(level) {
  const shown = talking && !muted ? loudness(level) : 0;
  byId("microphone-level").value = shown;
  ui.talk.style.setProperty("--level", shown.toFixed(3));
}

ui.talk.addEventListener("click", () => (talking ? stopTalking() : startTalking()));

/** The press on mute that is under way: a click toggles, a press that is held mutes while it lasts. */
let pressed = null;
function pressMute() {
  if (!talking || pressed !== null) return;
  pressed = { at: performance.now(), wasMuted: muted };
  setMuted(true);
}
function releaseMute() {
  if (pressed === null) return;
  const held = performance.now() - pressed.at >= HOLD_MS;
  setMuted(!held && !pressed.wasMuted);
  pressed = null;
}
ui.mute.addEventListener("pointerdown", (event) => {
  if (event.button === 0) pressMute();
});
window.addEventListener("pointerup", releaseMute);
window.addEventListener("pointercancel", releaseMute);
window.addEventListener("blur", releaseMute);
ui.mute.addEventListener("click", (event) => {
  if (event.detail === 0) setMuted(!muted);
});

ui.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = ui.text.value.trim();
  if (text === "") return;
  const size = new TextEncoder().encode(text).length;
  if (size > MAX_TEXT_BYTES) {
    hint(`That is ${size} bytes of text; the server takes at most ${MAX_TEXT_BYTES} at once.`);
    return;
  }
  if (!connection.open) {
    hint("Not connected; the text stays here until it can be sent.");
    return;
  }
  hint("");
  audio.start().catch((error) => hint(error.message));
  if (session.state === "SPEAKING") connection.send({ type: "user_speaking", confidence: 1 });
  connection.send({ type: "stt_fragment", text, is_final: true });
  connection.send({ type: "vad_end", confidence: 1 });
  conversation.typed = text;
  ui.text.value = "";
});

const turnRuns = () => session.state === "THINKING" || session.state === "SPEAKING";

function stopTurn() {
  if (ui.stop.disabled) return;
  dropAudio();
  if (turnRuns()) connection.send({ type: "cancel" });
}
ui.stop.addEventListener("click", stopTurn);

let sounding = false;
function showStop() {
  ui.stop.disabled = !(connection.open && (turnRuns() || sounding));
}

function showPlaying({ playedMs, queuedMs, peak }) {
  sounding = queuedMs > 0;
  byId("speaker-level").value = loudness(peak);
  write("speaker-state", sounding ? "speaking" : "silent");
  write("queued", milliseconds(queuedMs));
  ui.queued.dataset.ms = queuedMs;
  if (playedMs !== null) {
    write("played", milliseconds(playedMs));
    ui.played.dataset.ms = playedMs;
  }
  showStop();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopTurn();
  const typing = event.target instanceof HTMLInputElement;
  if (event.key.toLowerCase() === "m" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) pressMute();
});
document.addEventListener("keyup", (event) => {
  if (event.key.toLowerCase() === "m") releaseMute();
});
for (const gesture of ["pointerdown", "keydown"]) document.addEventListener(gesture, () => audio.resume());
ui.details.addEventListener("click", () => {
  const open = document.body.classList.toggle("details-open");
  ui.details.setAttribute("aria-expanded", String(open));
});

if (!audioPossible()) {
  standingHint = NO_AUDIO;
  ui.talk.disabled = true;
  hint("");
}

const wanted = parameters.get("session_id");
if (wanted === null || wanted === "") beginSession(newSessionId());
else if (isSessionId(wanted)) beginSession(wanted);
else {
  ui.connection.dataset.phase = "stopped";
  write("connection-text", "Disconnected");
  showBanner("The session_id in the address is not valid: 1 to 128 of A–Z a–z 0–9 . _ : -", "New conversation", false);
}
