/** Taps on each side of the centre, counted in samples of the slower of the two rates. */
const LOBES = 16;
/** Above this many phases a rate pair gets its nearest phase instead of the exact one. */
const MAX_PHASES = 1024;
/** The pass band ends a little below Nyquist, so that the filter's slope does not alias. */
const ROLL_OFF = 0.93;

function gcd(a, b) {
  return b === 0 ? a : gcd(b, a % b);
}

function kernel(x, cutoff, half) {
  const window = 0.42 + 0.5 * Math.cos((Math.PI * x) / half) + 0.08 * Math.cos((2 * Math.PI * x) / half);
  if (x === 0) return cutoff * window;
  return (Math.sin(Math.PI * cutoff * x) / (Math.PI * x)) * window;
}

/**
 * Streaming sample rate conversion of mono audio with a windowed sinc.
 *
 * Rates are in Hz. The output does not depend on how the input is cut into chunks.
 */
export class Resampler {
  constructor(fromRate, toRate) {
    this.same = fromRate === toRate;
    this.step = fromRate / toRate;
    const cutoff = Math.min(1, toRate / fromRate) * ROLL_OFF;
    this.half = Math.ceil(LOBES / Math.min(1, toRate / fromRate));
    this.phases = Math.min(MAX_PHASES, toRate / gcd(fromRate, toRate));
    this.width = 2 * this.half;
    this.taps = new Float32Array(this.phases * this.width);
    for (let phase = 0; phase < this.phases; phase += 1) {
      const fraction = phase / this.phases;
      for (let tap = 0; tap < this.width; tap += 1) {
        this.taps[phase * this.width + tap] = kernel(tap - this.half + 1 - fraction, cutoff, this.half);
      }
    }
    this.pending = new Float32Array(this.half - 1);
    this.produced = 0;
    this.dropped = 1 - this.half;
  }

  /** The output samples that `input` (a Float32Array) completes. */
  process(input) {
    if (this.same) return input;
    const samples = new Float32Array(this.pending.length + input.length);
    samples.set(this.pending);
    samples.set(input, this.pending.length);
    const end = this.dropped + samples.length;
    const last = Math.ceil((end - this.half) / this.step);
    const output = new Float32Array(Math.max(0, last - this.produced));
    for (let i = 0; i < output.length; i += 1) output[i] = this.sampleAt(samples, this.produced + i);
    this.produced += output.length;
    const keepFrom = Math.max(this.dropped, Math.floor(this.produced * this.step) - this.half + 1);
    this.pending = samples.slice(keepFrom - this.dropped);
    this.dropped = keepFrom;
    return output;
  }

  /** What is still inside the filter, once no more input comes. */
  finish() {
    return this.same ? new Float32Array(0) : this.process(new Float32Array(this.half));
  }

  sampleAt(samples, index) {
    const exact = index * this.step;
    let whole = Math.floor(exact + 1e-9);
    let phase = Math.round((exact - whole) * this.phases);
    if (phase >= this.phases) {
      phase -= this.phases;
      whole += 1;
    }
    const from = whole - this.half + 1 - this.dropped;
    const row = phase * this.width;
    let sum = 0;
    for (let tap = 0; tap < this.width; tap += 1) {
      const sample = samples[from + tap];
      if (sample !== undefined) sum += sample * this.taps[row + tap];
    }
    return sum;
  }
}
