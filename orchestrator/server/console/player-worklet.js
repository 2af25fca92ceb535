/** Seconds of audio to gather before a turn starts to sound, and again after its queue ran dry. */
const CUSHION_SECONDS = 0.06;
/** How often the page hears what was played. */
const PROGRESS_SECONDS = 0.05;
/** A cut in mid-wave clicks: the last sample fades by this factor per frame (to a thousandth in about 4 ms at 48 kHz). */
const FADE = 0.964;

/**
 * Jitter buffer and player. Samples come in at the context's rate, each block with its turn's number.
 *
 * Messages in: {kind: "audio", turn, samples}, {kind: "flush"}.
 * Messages out, all counts in frames: {kind: "progress", turn, played, queued, peak}, {kind: "dry", turn, played},
 * {kind: "flushed", dropped}.
 */
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.cushion = Math.round(sampleRate * CUSHION_SECONDS);
    this.progressEvery = Math.round(sampleRate * PROGRESS_SECONDS);
    this.blocks = [];
    this.offset = 0;
    this.queued = 0;
    this.turn = null;
    this.played = 0;
    this.peak = 0;
    this.last = 0;
    this.sounding = false;
    this.waited = 0;
    this.sinceProgress = 0;
    this.open = false;
    this.port.onmessage = ({ data }) => (data.kind === "audio" ? this.push(data) : this.flush());
  }

  push({ turn, samples }) {
    if (samples.length === 0) return;
    this.blocks.push({ turn, samples });
    this.queued += samples.length;
  }

  flush() {
    const dropped = this.queued;
    this.blocks = [];
    this.offset = 0;
    this.queued = 0;
    this.open = false;
    this.stopSounding();
    this.port.postMessage({ kind: "flushed", dropped });
  }

  stopSounding() {
    this.sounding = false;
    this.waited = 0;
    this.sinceProgress = 0;
    this.peak = 0;
  }

  process(_inputs, [[output]]) {
    let filled = 0;
    if (this.ready(output.length)) {
      while (filled < output.length && this.blocks.length > 0) filled += this.copy(output, filled);
      this.afterPlaying(filled);
    }
    for (let i = filled; i < output.length; i += 1) {
      this.last = Math.abs(this.last) < 1e-4 ? 0 : this.last * FADE;
      output[i] = this.last;
    }
    return true;
  }

  /** Whether to sound: the cushion is full, or no more came for as long as it takes to play it. */
  ready(frames) {
    if (this.sounding) return true;
    if (this.queued === 0) return false;
    this.waited += frames;
    this.sounding = this.queued >= this.cushion || this.waited >= this.cushion;
    return this.sounding;
  }

  copy(output, at) {
    const { turn, samples } = this.blocks[0];
    if (turn !== this.turn) {
      if (this.open) this.dry();
      this.turn = turn;
      this.played = 0;
    }
    this.open = true;
    const count = Math.min(output.length - at, samples.length - this.offset);
    for (let i = 0; i < count; i += 1) {
      const sample = samples[this.offset + i];
      output[at + i] = sample;
      if (Math.abs(sample) > this.peak) this.peak = Math.abs(sample);
    }
    this.last = output[at + count - 1];
    this.offset += count;
    this.queued -= count;
    this.played += count;
    if (this.offset === samples.length) {
      this.blocks.shift();
      this.offset = 0;
    }
    return count;
  }

  afterPlaying(frames) {
    this.sinceProgress += frames;
    if (this.queued === 0) {
      this.progress();
      this.stopSounding();
      this.dry();
    } else if (this.sinceProgress >= this.progressEvery) {
      this.progress();
    }
  }

  dry() {
    this.open = false;
    this.port.postMessage({ kind: "dry", turn: this.turn, played: this.played });
  }

  progress() {
    this.port.postMessage({ kind: "progress", turn: this.turn, played: this.played, queued: this.queued, peak: this.peak });
    this.sinceProgress = 0;
    this.peak = 0;
  }
}

registerProcessor("player", Player);
