// Microphone and loudspeaker on one clock, in the audio thread.
//
// Both sides advance by the same number of 24 kHz samples in every call, so a recording of the two is what happened, and
// the delay between a sample that was heard and the answer to it is a difference of two counters.
//
// Posts, every CHUNK samples: {user, moshi: Int16Array, talking, captured, played, userLevel, moshiLevel, ...counters};
// and {mark, at} when sample `mark` of Moshi's stream is played at sample `at` of the recording.
// Takes: {kind: "start" | "stop"}, {kind: "mute", on}, {kind: "pcm", samples: Int16Array}, {kind: "mark", at}.

import { Jitter } from "./jitter.js";
import { Resampler } from "./resample.js";

const CHUNK = 384; // five to a frame: the last sample of a frame is sent as soon as it is there

class Duplex extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate, frame } }) {
    super();
    this.rate = rate;
    // Two resamplers only where the context could not be had at the model's rate.
    const same = Math.abs(sampleRate - rate) < 1;
    this.down = same ? null : new Resampler(sampleRate, rate);
    this.up = same ? null : new Resampler(rate, sampleRate);
    this.ready = new Float32Array(0); // resampled, not yet played
    this.jitter = new Jitter(rate, frame);
    this.talking = false;
    this.muted = false;
    this.captured = 0;
    this.marks = [];
    this.user = new Int16Array(CHUNK);
    this.moshi = new Int16Array(CHUNK);
    this.fill = 0;
    this.port.onmessage = ({ data }) => this.take(data);
  }

  take(message) {
    if (message.kind === "pcm") {
      const samples = new Float32Array(message.samples.length);
      for (let i = 0; i < samples.length; i += 1) samples[i] = message.samples[i] / 32768;
      this.jitter.push(samples);
    } else if (message.kind === "mark") {
      this.marks.push(message.at);
    } else if (message.kind === "mute") {
      this.muted = message.on;
    } else if (message.kind === "start") {
      this.jitter.reset();
      this.marks = [];
      this.captured = 0;
      this.fill = 0;
      this.talking = true;
    } else if (message.kind === "stop") {
      this.talking = false;
    }
  }

  process(inputs, outputs) {
    const output = outputs[0];
    const heard = this.mono(inputs[0], output[0].length);
    const samples = this.down ? this.down.push(heard) : heard;
    const said = new Float32Array(samples.length);
    if (this.talking) this.jitter.pull(said);
    if (this.up) {
      const more = this.up.push(said);
      const all = new Float32Array(this.ready.length + more.length);
      all.set(this.ready);
      all.set(more, this.ready.length);
      // A block or two in hand evens out what the ratio leaves over; the first blocks are short and stay silent.
      const count = output[0].length;
      if (all.length >= count) {
        output[0].set(all.subarray(0, count));
        this.ready = all.slice(count);
      } else {
        this.ready = all;
      }
    } else {
      output[0].set(said);
    }
    for (let c = 1; c < output.length; c += 1) output[c].set(output[0]);
    this.keep(samples, said);
    this.passMarks();
    return true;
  }

  // All channels of the microphone as one; silence where there is none.
  mono(channels, count) {
    const heard = new Float32Array(count);
    for (const channel of channels) for (let i = 0; i < count; i += 1) heard[i] += channel[i] / channels.length;
    return heard;
  }

  keep(samples, said) {
    for (let i = 0; i < samples.length; i += 1) {
      // Muted is silence before anything leaves the audio thread.
      this.user[this.fill] = this.muted ? 0 : to16(samples[i]);
      this.moshi[this.fill] = to16(said[i]);
      this.fill += 1;
      if (this.talking) this.captured += 1;
      if (this.fill === CHUNK) this.post();
    }
  }

  post() {
    const { jitter, user, moshi } = this;
    this.port.postMessage(
      {
        user,
        moshi,
        talking: this.talking,
        captured: this.captured,
        played: jitter.read,
        begun: jitter.begun,
        underruns: jitter.underruns,
        dropped: jitter.dropped,
        targetDelay: jitter.targetDelay,
        userLevel: level(user),
        moshiLevel: level(moshi),
      },
      [user.buffer, moshi.buffer],
    );
    this.user = new Int16Array(CHUNK);
    this.moshi = new Int16Array(CHUNK);
    this.fill = 0;
  }

  passMarks() {
    while (this.marks.length && this.marks[0] <= this.jitter.read) {
      const mark = this.marks.shift();
      this.port.postMessage({ mark, at: Math.max(0, this.captured - (this.jitter.read - mark)) });
    }
  }
}

function to16(value) {
  return Math.max(-32768, Math.min(32767, Math.round(value * 32768)));
}

// Root mean square, 0 to 1.
function level(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return Math.sqrt(sum / samples.length) / 32768;
}

registerProcessor("duplex", Duplex);
