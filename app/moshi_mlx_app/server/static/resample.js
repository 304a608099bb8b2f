// Streaming resampler for any ratio: a windowed sinc, read from a table. Only for browsers that refuse an AudioContext
// at 24 kHz with a microphone of another rate (Firefox does); the others resample by themselves.

const LOBES = 16; // zero crossings on each side
const STEPS = 256; // table entries between two crossings, interpolated linearly
const BETA = 8.6; // Kaiser's: about 85 dB of stopband
const PASS = 0.94; // of the lower Nyquist frequency; the rest is the slope

function bessel(x) {
  let sum = 1;
  let term = 1;
  for (let k = 1; k < 40; k += 1) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

const TABLE = new Float32Array(LOBES * STEPS + 2);
for (let i = 0; i <= LOBES * STEPS; i += 1) {
  const x = i / STEPS;
  const sinc = x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
  TABLE[i] = (sinc * bessel(BETA * Math.sqrt(Math.max(0, 1 - (x / LOBES) ** 2)))) / bessel(BETA);
}

export class Resampler {
  // from, to: hertz. The output lags by `delay` input samples.
  constructor(from, to) {
    this.ratio = from / to;
    this.scale = PASS * Math.min(1, to / from); // the filter's cutoff, by the input's Nyquist frequency
    this.reach = Math.ceil(LOBES / this.scale);
    this.delay = this.reach;
    this.held = new Float32Array(2 * this.reach); // input that later outputs still need
    this.time = this.reach; // of the next output, in samples from the start of `held`
  }

  // Float32Array in, Float32Array out: as many samples as the ratio makes of it.
  push(input) {
    const data = new Float32Array(this.held.length + input.length);
    data.set(this.held);
    data.set(input, this.held.length);
    const last = data.length - this.reach - 1;
    const output = new Float32Array(Math.max(0, Math.ceil((last - this.time) / this.ratio + 1)));
    let count = 0;
    while (this.time < last && count < output.length) {
      const first = Math.ceil(this.time - this.reach);
      const end = Math.floor(this.time + this.reach);
      let sum = 0;
      for (let i = Math.max(0, first); i <= end; i += 1) {
        const x = Math.abs(this.time - i) * this.scale * STEPS;
        const k = x | 0;
        if (k < LOBES * STEPS) sum += data[i] * (TABLE[k] + (x - k) * (TABLE[k + 1] - TABLE[k]));
      }
      output[count] = sum * this.scale;
      count += 1;
      this.time += this.ratio;
    }
    const keep = Math.max(0, Math.floor(this.time) - this.reach - 1);
    this.held = data.slice(keep);
    this.time -= keep;
    return output.subarray(0, count);
  }
}
