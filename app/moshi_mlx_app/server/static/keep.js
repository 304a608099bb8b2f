// What is kept of a conversation: its sound as a stereo wav, its words with their times. In the page alone, until it is
// saved or the page is closed.

const HEADER = 44;
const PART = 30; // seconds that become one Blob: browsers keep those outside the page's memory, on disk if large
const LONGEST = 3 * 3600; // seconds; 1 GB. A wav could hold 12 hours, a phone could not

// Left Moshi as it was played, right the user as it was sent, sample by sample.
export class Recording {
  constructor(rate) {
    this.rate = rate;
    this.parts = [];
    this.frames = 0;
    this.block = new Int16Array(2 * PART * rate);
    this.fill = 0;
  }

  get seconds() {
    return this.frames / this.rate;
  }

  get full() {
    return this.seconds >= LONGEST;
  }

  // Two Int16Arrays of the same length.
  add(moshi, user) {
    if (this.full) return;
    for (let i = 0; i < moshi.length; i += 1) {
      this.block[this.fill] = moshi[i];
      this.block[this.fill + 1] = user[i];
      this.fill += 2;
      if (this.fill === this.block.length) {
        this.parts.push(new Blob([this.block]));
        this.fill = 0;
      }
    }
    this.frames += moshi.length;
  }

  wav() {
    const rest = this.block.slice(0, this.fill);
    return new Blob([wavHeader(this.frames, 2, this.rate), ...this.parts, rest], { type: "audio/wav" });
  }
}

function wavHeader(frames, channels, rate) {
  const view = new DataView(new ArrayBuffer(HEADER));
  const tag = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  const bytes = frames * channels * 2;
  tag(0, "RIFF");
  view.setUint32(4, HEADER - 8 + bytes, true);
  tag(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, channels, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, rate * channels * 2, true);
  view.setUint16(32, channels * 2, true);
  view.setUint16(34, 16, true);
  tag(36, "data");
  view.setUint32(40, bytes, true);
  return view.buffer;
}

const LAST = 6 * 0.08; // seconds that a word lasts at most after its last piece: as everywhere in this project
const PAUSE = 1.2; // seconds without a word, after which a new paragraph begins

// Pieces of text become words and paragraphs.
export class Words {
  constructor() {
    this.words = []; // {text, start, last, paragraph}
    this.paragraph = -1;
    this.user = []; // {text, start, end, begins}
  }

  // A word of the user's: whether it begins a turn is added.
  hear(word) {
    const before = this.user.at(-1);
    this.user.push({ ...word, begins: !before || word.start - before.end > PAUSE });
    return this.user.at(-1);
  }

  // piece: text as it came, a space before each new word. time: seconds in the recording. Returns the changed words.
  add(piece, time) {
    const changed = [];
    piece.split(/(?=\s)/).forEach((part) => {
      const before = this.words.at(-1);
      const text = part.trim();
      if (before && (!/^\s/.test(part) || !text) && time - before.last < PAUSE) {
        if (!text) return;
        before.text += text;
        before.last = time;
        changed.push(before);
      } else if (text) {
        if (!before || time - before.last > PAUSE) this.paragraph += 1;
        const word = { text, start: time, last: time, paragraph: this.paragraph };
        this.words.push(word);
        changed.push(word);
      }
    });
    return changed;
  }

  timed() {
    return this.words.map(({ text, start, last }, i) => {
      const next = this.words[i + 1]?.start ?? Infinity;
      return { text, start: round(start), end: round(Math.max(start, Math.min(next, last + LAST))) };
    });
  }

  // One line for each paragraph, with the time at its start.
  text() {
    const lines = [];
    for (const word of this.words) {
      if (word.paragraph !== lines.at(-1)?.paragraph) {
        lines.push({ paragraph: word.paragraph, start: word.start, text: `[${clock(word.start)}] ${word.text}` });
      } else {
        lines.at(-1).text += ` ${word.text}`;
      }
    }
    const theirs = [];
    for (const { text, start, begins } of this.user) {
      if (begins) theirs.push({ start, text: `[${clock(start)}] (you) ${text}` });
      else theirs.at(-1).text += ` ${text}`;
    }
    const all = [...lines, ...theirs].sort((one, other) => one.start - other.start);
    return all.map((line) => line.text).join("\n") + "\n";
  }

  // The JSON beside the wav `file`, in the form that every recording of this program has (docs/recordings.md). Its
  // beginning comes from the server.
  json({ speaker, ...transcript }, file, duration, complete) {
    const theirs = this.user.map(({ text, start, end }) => ({ text, start, end, speaker: "user" }));
    const words = [...this.timed().map((word) => ({ ...word, speaker })), ...theirs];
    words.sort((one, other) => one.start - other.start);
    const labels = { moshi: "SPEAKER_MAIN", user: "SPEAKER_OTHER" };
    const value = {
      ...transcript,
      complete,
      answer: { ...transcript.answer, file },
      duration: round(duration),
      text: this.words.map((word) => word.text).join(" "),
      words,
      alignments: words.map((word) => [word.text, [word.start, word.end], labels[word.speaker]]),
    };
    return `${JSON.stringify(value, null, 1)}\n`;
  }
}

export function clock(seconds) {
  const whole = Math.floor(seconds);
  const parts = [Math.floor(whole / 60) % 60, whole % 60].map((n) => String(n).padStart(2, "0"));
  const hours = Math.floor(whole / 3600);
  return hours ? `${hours}:${parts.join(":")}` : `${Number(parts[0])}:${parts[1]}`;
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function round(seconds) {
  return Math.round(seconds * 1000) / 1000;
}
