/** Gathers the microphone's samples into blocks at the context's own rate; the page resamples and frames them. */
class Capture extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.block = new Float32Array(Math.round(sampleRate * options.processorOptions.blockSeconds));
    this.filled = 0;
  }

  process([channels]) {
    const samples = channels[0];
    if (samples === undefined) return true;
    for (let from = 0; from < samples.length; ) {
      const part = samples.subarray(from, from + this.block.length - this.filled);
      this.block.set(part, this.filled);
      this.filled += part.length;
      from += part.length;
      if (this.filled === this.block.length) this.post();
    }
    return true;
  }

  post() {
    const full = this.block;
    this.block = new Float32Array(full.length);
    this.filled = 0;
    this.port.postMessage(full, [full.buffer]);
  }
}

registerProcessor("capture", Capture);
