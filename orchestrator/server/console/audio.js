import { Resampler } from "./resampler.js";

/** Hz of the microphone audio that the server takes. */
const MICROPHONE_RATE = 16000;
/** Samples of one microphone frame: 32 ms, one window of the usual voice activity detectors. */
const MICROPHONE_FRAME = 512;
/** Milliseconds of audio from one playback report to the next. */
const REPORT_EVERY_MS = 200;
/** A queue empty for this long has nothing on its way either. */
const ENDED_AFTER_MS = 150;
const PCM_SCALE = 32768;
/** Turns whose counters are kept: the one that sounds, the one behind it in the queue, and a spare. */
const TURNS_KEPT = 3;

const MICROPHONE_ERRORS = {
  NotAllowedError: "The browser may not use the microphone. Allow it in the site settings, or type instead.",
  NotFoundError: "No microphone was found. Connect one, or type instead.",
  NotReadableError: "The microphone is in use by another program. Close that one, or type instead.",
};

export const NO_AUDIO =
  "Browsers give sound and the microphone only to pages opened through https or localhost. Typing works here.";

export function audioPossible() {
  return window.isSecureContext && typeof AudioWorkletNode !== "undefined";
}

/** Raised with one line for the user when the browser cannot give sound or a microphone. */
export class AudioUnavailable extends Error {}

/** The browser's sound: one context, a player, and a microphone while it is open. */
export class AudioEngine {
  /**
   * Handlers: onReport({turn, playedMs, ended}), onPlaying({turn, playedMs, queuedMs, peak}),
   * onMicrophone(ArrayBuffer of PCM16), onLevel(0…1), onMicrophoneLost(text).
   */
  constructor(handlers) {
    this.handlers = handlers;
    this.context = null;
    this.starting = null;
    this.speaker = null;
    this.microphone = null;
    this.early = [];
    this.muted = false;
  }

  /** Call within a user's gesture: browsers start no sound without one. Raises AudioUnavailable. */
  async start() {
    this.starting ??= this.boot();
    try {
      await this.starting;
    } catch (error) {
      this.starting = null;
      this.early = [];
      throw error;
    }
  }

  async boot() {
    if (!audioPossible()) throw new AudioUnavailable(NO_AUDIO);
    const context = new AudioContext({ latencyHint: "interactive" });
    context.resume();
    try {
      await Promise.all(
        ["player-worklet.js", "capture-worklet.js"].map((name) =>
          context.audioWorklet.addModule(new URL(name, import.meta.url)),
        ),
      );
    } catch {
      context.close();
      throw new AudioUnavailable("The server did not deliver the page's sound parts. Try again in a moment.");
    }
    this.context = context;
    this.speaker = new Speaker(context, this.handlers);
    for (const chunk of this.early.splice(0)) this.speaker.push(...chunk);
  }

  /** Sound that a browser held back until the user touched the page. */
  resume() {
    if (this.context?.state === "suspended") this.context.resume();
  }

  get silenced() {
    return this.context !== null && this.context.state !== "running";
  }

  /** Queues PCM16 of a turn; what comes before the player stands waits for it. */
  push(turn, rate, pcm) {
    if (this.speaker !== null) this.speaker.push(turn, rate, pcm);
    else if (this.starting !== null) this.early.push([turn, rate, pcm]);
  }

  /** Everything queued is gone at once. */
  flush() {
    this.early = [];
    this.speaker?.flush();
  }

  /** No more audio of `turn` will come. */
  finish(turn) {
    this.speaker?.finish(turn);
  }

  /** Raises AudioUnavailable. */
  async openMicrophone() {
    await this.start();
    this.microphone = await Microphone.open(this.context, this.handlers);
    this.microphone.mute(this.muted);
  }

  closeMicrophone() {
    this.microphone?.close();
    this.microphone = null;
  }

  mute(muted) {
    this.muted = muted;
    this.microphone?.mute(muted);
  }
}

class Speaker {
  constructor(context, handlers) {
    this.context = context;
    this.handlers = handlers;
    this.turns = new Map();
    this.node = new AudioWorkletNode(context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.node.port.onmessage = ({ data }) => this[data.kind](data);
    this.node.connect(context.destination);
  }

  push(turn, rate, pcm) {
    const record = this.record(turn, rate);
    const samples = record.resampler.process(record.decode(pcm));
    record.frames += samples.length;
    this.node.port.postMessage({ kind: "audio", turn, samples }, [samples.buffer]);
  }

  record(turn, rate) {
    let record = this.turns.get(turn);
    if (record === undefined) {
      record = new TurnAudio(rate, this.context.sampleRate);
      this.turns.set(turn, record);
      if (this.turns.size > TURNS_KEPT) this.turns.delete(this.turns.keys().next().value);
    }
    return record;
  }

  flush() {
    for (const record of this.turns.values()) clearTimeout(record.timer);
    this.turns.clear();
    this.node.port.postMessage({ kind: "flush" });
  }

  finish(turn) {
    const record = this.turns.get(turn);
    if (record === undefined) return;
    record.complete = true;
    if (record.dry) this.end(turn, record);
  }

  progress({ turn, played, queued, peak }) {
    const record = this.turns.get(turn);
    if (record === undefined) return;
    const milliseconds = (frames) => (frames / this.context.sampleRate) * 1000;
    const playedMs = Math.max(0, milliseconds(played) - this.latencyMs());
    this.handlers.onPlaying({ turn, playedMs: milliseconds(played), queuedMs: milliseconds(queued), peak });
    if (milliseconds(played) - record.reportedMs < REPORT_EVERY_MS) return;
    record.reportedMs = milliseconds(played);
    this.report(turn, playedMs, false);
  }

  /** The queue is empty; what is still in the sound device's own buffer is heard a little later. */
  dry({ turn, played }) {
    const record = this.turns.get(turn);
    if (record === undefined || played < record.frames) return;
    clearTimeout(record.timer);
    record.timer = setTimeout(() => {
      record.dry = true;
      if (record.complete) {
        this.end(turn, record);
        return;
      }
      this.report(turn, record.receivedMs(), false);
      record.timer = setTimeout(() => this.end(turn, record), ENDED_AFTER_MS);
    }, this.latencyMs());
  }

  flushed() {
    this.handlers.onPlaying({ turn: null, playedMs: null, queuedMs: 0, peak: 0 });
  }

  end(turn, record) {
    clearTimeout(record.timer);
    if (record.ended) return;
    record.ended = true;
    this.report(turn, record.receivedMs(), true);
    this.handlers.onPlaying({ turn, playedMs: record.receivedMs(), queuedMs: 0, peak: 0 });
  }

  report(turn, playedMs, ended) {
    this.handlers.onReport({ turn, playedMs, ended });
  }

  latencyMs() {
    return (this.context.outputLatency || this.context.baseLatency || 0) * 1000;
  }
}

/** What came in of one turn, and how far it is converted. */
class TurnAudio {
  constructor(rate, contextRate) {
    this.rate = rate;
    this.resampler = new Resampler(rate, contextRate);
    this.samples = 0;
    this.frames = 0;
    this.halfSample = new Uint8Array(0);
    this.reportedMs = 0;
    this.timer = null;
    this.dry = false;
    this.complete = false;
    this.ended = false;
  }

  /** The chunk as floats. A byte left over is half of the next chunk's first sample. */
  decode(pcm) {
    const bytes = new Uint8Array(this.halfSample.length + pcm.byteLength);
    bytes.set(this.halfSample);
    bytes.set(new Uint8Array(pcm), this.halfSample.length);
    const count = bytes.length >> 1;
    this.halfSample = bytes.slice(count * 2);
    const view = new DataView(bytes.buffer);
    const floats = new Float32Array(count);
    for (let i = 0; i < count; i += 1) floats[i] = view.getInt16(i * 2, true) / PCM_SCALE;
    this.samples += count;
    clearTimeout(this.timer);
    this.dry = false;
    this.ended = false;
    return floats;
  }

  receivedMs() {
    return (this.samples / this.rate) * 1000;
  }
}

class Microphone {
  static async open(context, handlers) {
    if (!navigator.mediaDevices?.getUserMedia) throw new AudioUnavailable("This browser has no microphone access.");
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
    } catch (error) {
      throw new AudioUnavailable(MICROPHONE_ERRORS[error.name] ?? `The microphone did not open: ${error.message}`);
    }
    return new Microphone(context, stream, handlers);
  }

  constructor(context, stream, handlers) {
    this.stream = stream;
    this.handlers = handlers;
    this.resampler = new Resampler(context.sampleRate, MICROPHONE_RATE);
    this.frame = new Int16Array(MICROPHONE_FRAME);
    this.filled = 0;
    this.source = context.createMediaStreamSource(stream);
    this.node = new AudioWorkletNode(context, "capture", {
      channelCount: 1,
      channelCountMode: "explicit",
      processorOptions: { blockSeconds: MICROPHONE_FRAME / MICROPHONE_RATE },
    });
    this.node.port.onmessage = ({ data }) => this.take(data);
    this.source.connect(this.node);
    // The node's output is silence; a node that leads nowhere is not run by every browser.
    this.node.connect(context.destination);
    for (const track of stream.getAudioTracks()) {
      track.onended = () => handlers.onMicrophoneLost("The microphone was disconnected.");
    }
  }

  take(block) {
    let squares = 0;
    for (const sample of this.resampler.process(block)) {
      squares += sample * sample;
      this.frame[this.filled] = Math.max(-PCM_SCALE, Math.min(PCM_SCALE - 1, Math.round(sample * PCM_SCALE)));
      this.filled += 1;
      if (this.filled === MICROPHONE_FRAME) {
        this.handlers.onMicrophone(this.frame.buffer);
        this.frame = new Int16Array(MICROPHONE_FRAME);
        this.filled = 0;
      }
    }
    this.handlers.onLevel(Math.sqrt(squares / MICROPHONE_FRAME));
  }

  /** A muted microphone goes on as silence, so that the server still sees the end of what was said before. */
  mute(muted) {
    for (const track of this.stream.getAudioTracks()) track.enabled = !muted;
  }

  close() {
    this.node.port.onmessage = null;
    this.source.disconnect();
    this.node.disconnect();
    for (const track of this.stream.getTracks()) {
      track.onended = null;
      track.stop();
    }
  }
}
