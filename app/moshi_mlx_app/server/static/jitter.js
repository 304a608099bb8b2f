// Moshi's sound between the network and the loudspeaker.
//
// Frames of 80 ms come when they come; samples are wanted in blocks, on time. What lies here just before the next frame
// comes is the target delay. Too little: a gap, faded, counted, and the target delay grows. Too much: delay that nobody needs, which
// is given back where Moshi is silent. Far too much, after a stall: the oldest is dropped and counted.

const FADE = 0.005; // seconds
const FLOOR = 0.0316; // a peak of -30 dB: quieter than speech
const LOOK = 20; // seconds: how long a target delay must have been idle before it is given back

export class Jitter {
  // rate: hertz. frame: samples that come at once. least, most, ceiling: seconds of target delay, and of sound held at all.
  constructor(rate, frame, { least = 0.03, most = 0.2, ceiling = 0.6 } = {}) {
    Object.assign(this, { rate, frame });
    this.least = Math.round(least * rate);
    this.most = Math.round(most * rate);
    this.ceiling = Math.round(ceiling * rate);
    this.ring = new Float32Array(1 << Math.ceil(Math.log2(4 * rate)));
    this.fade = Math.round(FADE * rate);
    this.reset();
  }

  reset() {
    this.written = 0; // samples since the beginning, as everything below
    this.read = 0;
    this.pulled = 0;
    this.underruns = 0;
    this.dropped = 0;
    this.trimmed = 0;
    this.targetDelay = this.least;
    this.playing = false;
    this.begun = false;
    this.hold = 0;
    this.tail = 0; // the last sample that was played, for the fade
    this.rise = 0; // how far the fade-in is
    this.excess = 0;
    this.low = Infinity; // least delay seen in this look
    this.lookEnd = LOOK * this.rate;
    this.jump = null;
  }

  get held() {
    return this.written - this.read;
  }

  at(index) {
    return this.ring[index & (this.ring.length - 1)];
  }

  // A frame, Float32Array.
  push(samples) {
    if (this.playing) this.low = Math.min(this.low, this.held);
    for (let i = 0; i < samples.length; i += 1) this.ring[(this.written + i) & (this.ring.length - 1)] = samples[i];
    const wasHeld = this.held;
    this.written += samples.length;
    if (!this.playing && wasHeld < this.frame && this.held >= this.frame) this.hold = this.targetDelay;
    // Nobody pulls (the system took the sound away): what the ring cannot hold is gone.
    if (this.held > this.ring.length - this.frame) this.drop();
  }

  // Leave a frame and the target delay.
  drop() {
    const count = this.held - this.frame - this.targetDelay;
    this.dropped += count;
    this.skip(count);
  }

  // Go on `count` samples later; what was there fades into what is there.
  skip(count) {
    const from = this.read;
    this.read += count;
    if (this.playing) this.jump = { from, done: 0 };
  }

  // Fill `out`; true where all of it was sound that had come.
  pull(out) {
    this.pulled += out.length;
    // Not in the middle of a fade, which would click, but right after.
    if (this.held > this.ceiling && !this.jump) this.drop();
    if (!this.playing) {
      this.decay(out, 0);
      this.hold -= out.length;
      if (this.held >= this.frame && this.hold <= 0) {
        this.playing = true;
        this.begun = true;
        this.rise = 0;
      }
      return false;
    }
    this.giveBack(out.length);
    const count = Math.min(out.length, this.held);
    for (let i = 0; i < count; i += 1) {
      let value = this.at(this.read + i);
      if (this.jump) {
        const old = this.jump.from + this.jump.done;
        const share = this.jump.done / this.fade;
        // What is older than the ring has been written over by now.
        if (this.written - old < this.ring.length) value = share * value + (1 - share) * this.at(old);
        this.jump.done += 1;
        if (this.jump.done >= this.fade) this.jump = null;
      }
      if (this.rise < this.fade) {
        value *= this.rise / this.fade;
        this.rise += 1;
      }
      out[i] = value;
    }
    this.read += count;
    if (count) this.tail = out[count - 1];
    if (count === out.length) return true;
    this.decay(out, count);
    this.playing = false;
    this.hold = 0;
    this.jump = null;
    this.underruns += 1;
    this.targetDelay = Math.min(this.most, this.targetDelay + Math.round(0.02 * this.rate));
    this.restartLook();
    return false;
  }

  // Let the last sample die away instead of breaking off.
  decay(out, start) {
    for (let i = start; i < out.length; i += 1) {
      this.tail *= 1 - 4 / this.fade;
      out[i] = Math.abs(this.tail) > 1e-5 ? this.tail : 0;
    }
  }

  restartLook() {
    this.low = Infinity;
    this.lookEnd = this.pulled + LOOK * this.rate;
  }

  giveBack(count) {
    if (this.pulled >= this.lookEnd) {
      this.targetDelay = Math.max(this.least, this.targetDelay - Math.round(0.01 * this.rate));
      const spare = Number.isFinite(this.low) ? this.low - this.targetDelay : 0;
      this.excess = spare > 0.02 * this.rate ? spare : 0;
      this.restartLook();
    }
    if (this.excess < count || this.held < 2 * count || this.jump) return;
    for (let i = 0; i < 2 * count; i += 1) if (Math.abs(this.at(this.read + i)) > FLOOR) return;
    this.skip(count);
    this.excess -= count;
    this.trimmed += count;
  }
}
