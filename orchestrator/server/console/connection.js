const FIRST_RETRY_MS = 250;
const LAST_RETRY_MS = 8000;
/** A connection that lived this long was a good one: the next loss starts again at the first delay. */
const STABLE_MS = 3000;
const PING_EVERY_MS = 5000;
/** A ping unanswered for this long: the connection is dead, whatever the browser still believes. */
const SILENT_MS = 12000;
/** Audio from the microphone that the network did not take in this time is of no use any more: 2 s of PCM16 at 16 kHz. */
const MAX_UNSENT_BYTES = 64000;

/** Close codes after which trying again by itself would do harm or no good. */
const FINAL = {
  1002: ["stopped", "The server found a protocol error in what this page sent."],
  1007: ["stopped", "The server found malformed text in what this page sent."],
  1008: ["stopped", "The server refused this connection's traffic."],
  1009: ["stopped", "A message was larger than the server accepts."],
  4400: ["stopped", "The server closed the connection after too many messages it could not accept."],
  4401: ["token", "The access token has expired."],
  4409: ["stopped", "This conversation goes on in another window or connection."],
  4410: ["expired", "The conversation was idle for too long and has ended."],
};
const REASONS = {
  1003: "This server has no speech-to-text connected; the microphone is off. Typing works.",
  1012: "The server is restarting.",
  4408: "The connection was too slow for the audio.",
  4429: "Too many messages were sent.",
};
const REFUSALS = {
  400: ["stopped", "The server does not accept this session id."],
  401: ["token", "This server needs an access token."],
  403: ["token", "The access token is not valid for this conversation, or this page's address is not allowed."],
};

/**
 * One conversation's connection. It comes back by itself with the same session id and `last_seq`.
 *
 * Handlers: onMessage(object), onAudio(ArrayBuffer), onStatus({phase, text, code, retryInMs}), onRoundTrip(milliseconds).
 * Phases: "connecting", "open", "waiting" (tries again in retryInMs), and, until `connect` is called again, "stopped",
 * "token" and "expired".
 */
export class Connection {
  constructor(address, handlers) {
    this.address = address;
    this.handlers = handlers;
    this.token = "";
    this.sessionId = "";
    this.lastSeq = null;
    this.phase = "stopped";
    this.socket = null;
    this.attempts = 0;
    this.timers = { retry: null, ping: null, drain: null };
    window.addEventListener("online", () => this.phase === "waiting" && this.connect());
  }

  /** Starts a conversation, or joins the one named. */
  begin(sessionId, token) {
    this.sessionId = sessionId;
    this.token = token;
    this.lastSeq = null;
    this.attempts = 0;
    this.connect();
  }

  get open() {
    return this.phase === "open";
  }

  /** Whether the message went out; nothing is kept for later. */
  send(message) {
    if (!this.open || this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  /** A frame of microphone audio: late ones are dropped rather than queued. */
  sendAudio(pcm) {
    if (this.open && this.socket.bufferedAmount < MAX_UNSENT_BYTES) this.socket.send(pcm);
  }

  connect() {
    this.drop();
    this.status("connecting", "Connecting");
    const url = new URL(this.address);
    url.searchParams.set("session_id", this.sessionId);
    url.searchParams.set("events", "all");
    if (this.lastSeq !== null) url.searchParams.set("last_seq", this.lastSeq);
    if (this.token) url.searchParams.set("token", this.token);
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.askedAt = performance.now();
    this.openedAt = null;
    let accepted = false;
    socket.onopen = () => {
      accepted = true;
    };
    socket.onmessage = ({ data }) => this.receive(data);
    socket.onclose = (event) => this.lost(event.code, accepted);
    this.timers.ping = setInterval(() => this.ping(), PING_EVERY_MS);
  }

  /** Lets the present socket go without a word of it reaching the handlers. */
  drop() {
    clearTimeout(this.timers.retry);
    clearTimeout(this.timers.drain);
    clearInterval(this.timers.ping);
    if (this.socket === null) return;
    this.socket.onopen = this.socket.onmessage = this.socket.onclose = null;
    this.socket.close(1000);
    this.socket = null;
  }

  receive(data) {
    this.askedAt = null;
    if (typeof data !== "string") {
      this.handlers.onAudio(data);
      return;
    }
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      message = null;
    }
    if (message === null || typeof message !== "object") return;
    if (message.type === "connected") this.welcomed(message);
    if (Number.isInteger(message.seq)) this.lastSeq = Math.max(this.lastSeq ?? 0, message.seq);
    if (message.type === "pong" && typeof message.id === "number") {
      this.handlers.onRoundTrip(performance.now() - message.id);
      return;
    }
    this.handlers.onMessage(message);
  }

  welcomed(message) {
    this.openedAt = performance.now();
    this.lastSeq = null;
    this.status("open", "Connected");
    this.ping();
  }

  ping() {
    const now = performance.now();
    if (this.askedAt !== null && now - this.askedAt > SILENT_MS) this.lost(1006, true);
    else if (this.send({ type: "ping", id: Math.round(now) })) this.askedAt ??= now;
  }

  /** The worker is going. Its own close comes with 1012; if it stays away, leave as soon as no turn is cut short. */
  draining(afterMs, isIdle) {
    this.comeBackMs = afterMs;
    clearTimeout(this.timers.drain);
    const leave = () => {
      if (isIdle()) this.lost(1012, true);
      else this.timers.drain = setTimeout(leave, FIRST_RETRY_MS);
    };
    this.timers.drain = setTimeout(leave, Math.max(afterMs, FIRST_RETRY_MS));
  }

  lost(code, accepted) {
    this.drop();
    if (this.openedAt !== null && performance.now() - this.openedAt > STABLE_MS) this.attempts = 0;
    if (code in FINAL) {
      const [phase, text] = FINAL[code];
      this.status(phase, text, { code });
      return;
    }
    const drained = code === 1012 && Number.isFinite(this.comeBackMs) ? this.comeBackMs : 0;
    this.comeBackMs = undefined;
    const backoff = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** this.attempts);
    const delay = Math.max(drained, Math.round(backoff * (0.5 + Math.random() / 2)));
    this.attempts += 1;
    this.timers.retry = setTimeout(() => this.connect(), delay);
    const text = accepted ? (REASONS[code] ?? "The connection was lost.") : "The server did not take the connection.";
    this.status("waiting", text, { code, retryInMs: delay });
    if (!accepted) this.explainRefusal(this.timers.retry);
  }

  /** A browser does not tell a page why a handshake was refused; the session's own address does. */
  async explainRefusal(retry) {
    const url = new URL(`sessions/${encodeURIComponent(this.sessionId)}`, document.baseURI);
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    let answer = null;
    try {
      answer = await fetch(url, { headers, cache: "no-store" });
    } catch {
      answer = null;
    }
    if (this.phase !== "waiting" || this.timers.retry !== retry) return;
    if (answer !== null && answer.status in REFUSALS) {
      clearTimeout(retry);
      const [phase, text] = REFUSALS[answer.status];
      this.status(phase, text, { code: answer.status });
      return;
    }
    if (answer === null) this.status("waiting", "The server does not answer.");
    if (answer?.status === 503) {
      const delay = Math.max(1, Number(answer.headers.get("Retry-After")) || 1) * 1000;
      clearTimeout(retry);
      this.timers.retry = setTimeout(() => this.connect(), delay);
      this.status("waiting", "The server takes no more conversations right now.", { code: 503, retryInMs: delay });
    }
  }

  status(phase, text, more = {}) {
    this.phase = phase;
    this.handlers.onStatus({ phase, text, code: 0, retryInMs: null, ...more });
  }
}
