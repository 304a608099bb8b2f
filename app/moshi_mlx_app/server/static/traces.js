// Who speaks when: Moshi above the line, the user below, newest on the right. One bar is one frame of Moshi's, 80 ms.

import { loudness } from "./shape.js";

const PITCH = 5; // CSS pixels of a bar and the gap behind it
const BLOCKS = 5; // of 16 ms in a bar
const MOST = 600; // bars that are remembered
const EVERY = 25; // bars between two marks
const FRAME = 1000 / 30; // ms
const CALM = 1000 / 8;
const SILENCE = [0, 0, false, false];

export class Traces {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.readColours());
    this.readColours();
    this.reset();
    new ResizeObserver(() => this.resize()).observe(canvas);
    const tick = (now) => {
      requestAnimationFrame(tick);
      if (!this.live || now - this.then < (this.still.matches ? CALM : FRAME) - 4) return;
      this.then = now;
      this.draw(now);
    };
    this.then = 0;
    requestAnimationFrame(tick);
  }

  reset() {
    this.bars = []; // [user, moshi, muted, gap]
    this.count = 0; // bars since the beginning
    this.now = [0, 0, false, false];
    this.blocks = 0;
    this.came = 0;
    this.live = true;
    this.underruns = 0;
  }

  stop() {
    this.live = false;
    this.draw(this.came);
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    this.colours = Object.fromEntries(["moshi", "user", "line", "soft", "warn"].map((name) => [name, read(`--${name}`)]));
    if (this.bars && !this.live) this.draw(this.came);
  }

  resize() {
    const { width, height } = this.canvas.getBoundingClientRect();
    this.scale = Math.min(2, devicePixelRatio || 1);
    this.canvas.width = Math.round(width * this.scale);
    this.canvas.height = Math.round(height * this.scale);
    this.draw(this.came);
  }

  // Levels of one block of 16 ms. gap: Moshi's sound was interrupted.
  hear(user, moshi, muted, gap) {
    const bar = this.now;
    bar[0] = Math.max(bar[0], loudness(user));
    bar[1] = Math.max(bar[1], loudness(moshi));
    bar[2] = bar[2] || muted;
    bar[3] = bar[3] || gap;
    this.blocks += 1;
    if (this.blocks < BLOCKS) return;
    this.bars.push(bar);
    if (this.bars.length > MOST) this.bars.shift();
    this.count += 1;
    this.now = [0, 0, false, false];
    this.blocks = 0;
    this.came = performance.now();
  }

  draw(now) {
    const { pen, canvas, colours, bars } = this;
    const width = canvas.width / (this.scale || 1);
    const height = canvas.height / (this.scale || 1);
    pen.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const middle = height / 2;
    const tall = middle - 8;
    // Between two bars the picture moves on by itself, unless motion is not wanted.
    const part = this.still.matches || !this.live ? 1 : Math.min(1, (now - this.came) / 80);
    const right = width - 2 + PITCH * (1 - part);
    pen.fillStyle = colours.line;
    // A fine mark every two seconds.
    for (let i = (this.count - 1) % EVERY; i < bars.length; i += EVERY) {
      pen.fillRect(right - (i + 1) * PITCH - 2, 4, 1, height - 8);
    }
    // Before the conversation there was silence, as wide as the picture is.
    for (let i = 0; i < MOST; i += 1) {
      const [user, moshi, muted, gap] = bars[bars.length - 1 - i] ?? SILENCE;
      const x = right - (i + 1) * PITCH;
      if (x < 0) break;
      this.bar(x, middle - 2, -Math.max(2.5, moshi * tall), moshi > 0.03 ? colours.moshi : colours.line);
      if (muted) {
        pen.strokeStyle = colours.user;
        pen.lineWidth = 1;
        pen.strokeRect(x + 0.5, middle + 3.5, 2, 2);
      } else {
        this.bar(x, middle + 2, Math.max(2.5, user * tall), user > 0.03 ? colours.user : colours.line);
      }
      if (gap) {
        pen.fillStyle = colours.warn;
        pen.fillRect(x, 0, 2, 7);
      }
    }
  }

  bar(x, y, tall, colour) {
    const { pen } = this;
    pen.fillStyle = colour;
    pen.beginPath();
    if (pen.roundRect) pen.roundRect(x, Math.min(y, y + tall), 3, Math.abs(tall), 1.5);
    else pen.rect(x, Math.min(y, y + tall), 3, Math.abs(tall));
    pen.fill();
  }
}
