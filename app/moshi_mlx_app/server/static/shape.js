// The sphere: Moshi in the middle, fine lines around it. Your voice travels along the lines inwards, Moshi's outwards,
// both at once if both speak. At rest it breathes.

const RINGS = 9;
const POINTS = 96;
const STEP = 4; // blocks of levels (16 ms each) that a wave takes from one line to the next
const FRAME = 1000 / 30; // ms: this machine has a model to run, too
const CALM = 1000 / 8; // where little motion is wanted

// Loudness as the eye wants it, 0 to 1, of a root mean square.
export function loudness(level) {
  return Math.max(0, Math.min(1, (20 * Math.log10(Math.max(level, 1e-5)) + 52) / 40));
}

export class Shape {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.user = new Float32Array(RINGS * STEP + 1); // newest first
    this.moshi = new Float32Array(RINGS * STEP + 1);
    this.mood = "rest"; // rest, wait, talk, deaf, over
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.readColours());
    this.readColours();
    this.then = 0;
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.resize();
    const tick = (now) => {
      requestAnimationFrame(tick);
      if (now - this.then < (this.still.matches ? CALM : FRAME) - 4) return;
      this.then = now;
      this.draw(now / 1000);
    };
    requestAnimationFrame(tick);
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    this.colours = { moshi: read("--moshi"), user: read("--user"), line: read("--line"), soft: read("--soft") };
    this.colours.lit = this.dark.matches ? "#c3ceff" : "#5f7bff";
    this.colours.deep = this.dark.matches ? "#4a60d8" : "#1c33a6";
  }

  resize() {
    const scale = Math.min(2, devicePixelRatio || 1);
    const { width, height } = this.canvas.getBoundingClientRect();
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
  }

  // Levels of one block, root mean squares.
  hear(user, moshi) {
    for (const [history, level] of [[this.user, user], [this.moshi, moshi]]) {
      history.copyWithin(1, 0, history.length - 1);
      const loud = loudness(level);
      // Up at once, down slowly: speech, not its every period.
      history[0] = Math.max(loud, history[1] * 0.86);
    }
  }

  quieten() {
    this.user.fill(0);
    this.moshi.fill(0);
  }

  draw(now) {
    const { pen, canvas, colours, mood } = this;
    const time = this.still.matches ? 0 : now;
    const size = Math.min(canvas.width, canvas.height);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.translate(canvas.width / 2, canvas.height / 2);
    const breath = 1 + 0.014 * Math.sin(time * 1.1);
    const core = size * 0.19 * breath;
    const reach = size * 0.46;
    for (let ring = RINGS; ring >= 1; ring -= 1) {
      const share = ring / RINGS;
      // A wave of yours is at this line after it crossed those outside of it; one of Moshi's after those inside.
      const user = mood === "deaf" ? 0 : this.user[(RINGS - ring) * STEP];
      const moshi = this.moshi[ring * STEP];
      const radius = core * 1.18 + (reach - core * 1.18) * share ** 0.92;
      const swell = size * (0.016 * moshi * (1.1 - share * 0.5) + 0.014 * user * (0.5 + share * 0.6));
      const wobble = size * (0.0016 + 0.01 * Math.max(user, moshi));
      this.outline(radius * breath + swell, wobble, time, ring);
      pen.strokeStyle = colours.line;
      pen.globalAlpha = 1.0 - 0.6 * share;
      pen.lineWidth = size * 0.0024;
      pen.stroke();
      for (const [level, colour] of [[moshi, colours.moshi], [user, colours.user]]) {
        if (level < 0.02) continue;
        pen.strokeStyle = colour;
        pen.globalAlpha = Math.min(1, level * 1.5) * (1 - 0.25 * share);
        pen.lineWidth = size * (0.0022 + 0.0062 * level);
        pen.stroke();
      }
    }
    pen.globalAlpha = 1;
    const voice = this.moshi[0];
    this.outline(core * (1 + 0.13 * voice), size * (0.0016 + 0.008 * voice), time * 1.3, 0);
    if (mood === "over") {
      pen.strokeStyle = colours.moshi;
      pen.lineWidth = size * 0.006;
      pen.stroke();
    } else {
      const light = pen.createRadialGradient(-core * 0.35, -core * 0.45, core * 0.1, 0, 0, core * 1.25);
      light.addColorStop(0, colours.lit);
      light.addColorStop(0.55, colours.moshi);
      light.addColorStop(1, colours.deep);
      pen.fillStyle = light;
      pen.fill();
    }
    if (mood === "wait") {
      // Someone circles and waits.
      const angle = time * 1.4 - Math.PI / 2;
      pen.beginPath();
      pen.arc(Math.cos(angle) * core * 1.75, Math.sin(angle) * core * 1.75, size * 0.018, 0, 7);
      pen.fillStyle = colours.user;
      pen.fill();
    }
    if (mood === "deaf") {
      pen.beginPath();
      pen.arc(0, 0, reach * breath, 0, 7);
      pen.setLineDash([size * 0.004, size * 0.022]);
      pen.lineCap = "round";
      pen.lineWidth = size * 0.008;
      pen.strokeStyle = colours.user;
      pen.stroke();
      pen.setLineDash([]);
    }
  }

  // A circle that is alive.
  outline(radius, wobble, time, ring) {
    const { pen } = this;
    pen.beginPath();
    for (let i = 0; i <= POINTS; i += 1) {
      const angle = (i / POINTS) * 2 * Math.PI;
      const wave =
        Math.sin(2 * angle + time * 0.9 + ring * 0.35) +
        0.7 * Math.sin(3 * angle - time * 1.3 + ring * 0.5) +
        0.4 * Math.sin(5 * angle + time * 1.9 - ring * 0.7);
      const r = radius + wobble * wave;
      const x = Math.cos(angle) * r;
      const y = Math.sin(angle) * r;
      if (i) pen.lineTo(x, y);
      else pen.moveTo(x, y);
    }
    pen.closePath();
  }
}
