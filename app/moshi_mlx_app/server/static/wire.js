// The server's protocol: binary messages, the first byte says what the rest is.
//
// Sound goes as it is, 16 bits at 24 kHz, both ways: 48 kB a second each, which is nothing on this machine and little in
// this house. Ogg/Opus would need an encoder that not every browser has and a muxer for it, and would add delay.

const HANDSHAKE = 0x00;
const METADATA = 0x04;
const ERROR = 0x05;
const PCM = 0x10;
const EVENT = 0x11;

const BACKLOG = 96_000; // bytes that may wait to be sent: two seconds; more is dropped, or the delay would grow
const STILL = 1_000; // ms without any, after which the server stands still: what is sent now would be heard too late
const PRESENT = 2_000; // ms between two signs that somebody waits
const PATIENCE = 15_000; // ms without any message (the server sends four a second) until the server counts as gone

// The page's own link carries the token, if there is one; it is passed on.
export function token() {
  return new URLSearchParams(location.search).get("token");
}

export function address(path, query = {}) {
  const own = token();
  const all = new URLSearchParams({ ...query, ...(own ? { token: own } : {}) });
  const text = all.toString();
  return new URL(path + (text ? `?${text}` : ""), location.href);
}

// What is served here: {info}, or {error: "token" | "gone", detail}.
export async function askInfo() {
  try {
    const response = await fetch(address("/api/info"), { cache: "no-store" });
    if (response.status === 403) return { error: "token", detail: (await response.text()).trim() };
    if (!response.ok) return { error: "gone", detail: `The server answered ${response.status}.` };
    return { info: await response.json() };
  } catch {
    return { error: "gone", detail: "" };
  }
}

// One connection. `on` is told: begun(metadata), sound(Int16Array), event(object), closed({reason, opened}).
export class Wire {
  constructor(sampling, on) {
    this.on = on;
    this.begun = false;
    this.opened = false;
    this.reason = "";
    this.unsent = 0; // samples that were dropped here
    this.done = false;
    this.told = 0; // when, that somebody waits
    const url = address("/api/chat", { audio: "pcm", events: "1", ...sampling });
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      this.opened = true;
      this.lively();
    };
    this.socket.onmessage = ({ data }) => this.take(new Uint8Array(data));
    this.socket.onclose = ({ code, reason }) => this.close(this.reason || reason, code);
    this.watch = setInterval(() => {
      if (performance.now() - this.last > PATIENCE) this.close("Nothing was heard of the server any more.", 1006);
    }, 1000);
    this.lively();
  }

  lively() {
    this.last = performance.now();
  }

  // The server says something several times a second, unless it stands still.
  get still() {
    return this.opened && performance.now() - this.last > STILL;
  }

  take(message) {
    this.lively();
    const kind = message[0];
    const content = message.subarray(1);
    if (kind === HANDSHAKE) this.begun = true;
    else if (kind === METADATA) this.on.begun(JSON.parse(utf8(content)));
    else if (kind === ERROR) this.reason = utf8(content);
    else if (kind === PCM) this.on.sound(samplesOf(content));
    else if (kind === EVENT) {
      const event = JSON.parse(utf8(content));
      if (event.type === "end") this.reason = this.reason || event.reason;
      this.on.event(event);
    }
    // 0x02 is the words without their time, which come as an event too; 0x06 only says that the server lives.
  }

  // Int16Array, once the conversation has begun.
  sendSound(samples) {
    if (!this.begun || this.socket.readyState !== WebSocket.OPEN) return;
    if (this.still || this.socket.bufferedAmount > BACKLOG) {
      this.unsent += samples.length;
      return;
    }
    const message = new Uint8Array(1 + samples.byteLength);
    message[0] = PCM;
    // Every machine that runs a browser with AudioWorklet is little-endian, as the protocol is.
    message.set(new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength), 1);
    this.socket.send(message);
  }

  // In line a place is kept for somebody who is there.
  present() {
    const now = performance.now();
    if (this.begun || now - this.told < PRESENT) return;
    this.told = now;
    this.sendEvent({ type: "present" });
  }

  sendEvent(event) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    const text = new TextEncoder().encode(JSON.stringify(event));
    const message = new Uint8Array(1 + text.length);
    message[0] = EVENT;
    message.set(text, 1);
    this.socket.send(message);
  }

  // Leave; `closed` is not told.
  leave() {
    this.done = true;
    clearInterval(this.watch);
    this.socket.onmessage = null;
    this.socket.close(1000);
  }

  close(reason, code) {
    if (this.done) return;
    this.leave();
    this.on.closed({ reason, code, opened: this.opened });
  }
}

function utf8(bytes) {
  return new TextDecoder().decode(bytes);
}

function samplesOf(content) {
  // A copy: the samples start at an odd byte of the message.
  return new Int16Array(content.slice().buffer, 0, content.length >> 1);
}
