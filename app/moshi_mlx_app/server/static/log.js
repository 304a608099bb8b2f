// Moshi's words on the page, and for screen readers.

import { Words, clock } from "./keep.js";
import { element } from "./settings.js";

const PAUSE = 1500; // ms after Moshi's last word, when a screen reader is told what was said
const NEAR = 60; // CSS pixels from the end that still count as the end

export class Log {
  constructor(log, announcer) {
    Object.assign(this, { log, announcer });
    log.addEventListener("scroll", () => {
      this.pinned = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    });
    new ResizeObserver(() => this.follow()).observe(log);
    this.clear();
  }

  clear() {
    clearTimeout(this.timer);
    this.words = new Words();
    this.shown = new Map(); // word > its element
    this.unsaid = "";
    this.pinned = true;
    this.log.replaceChildren();
    this.announcer.replaceChildren();
  }

  get empty() {
    return this.words.words.length === 0;
  }

  hint(text) {
    this.log.replaceChildren(element("p", text, "hint"));
  }

  // A piece of text, as it came; seconds in the recording.
  add(piece, time) {
    for (const word of this.words.add(piece, time)) {
      if (!this.shown.has(word)) {
        const shown = element("span");
        this.paragraph(word).append(shown, " ");
        this.shown.set(word, shown);
      }
      this.shown.get(word).textContent = word.text;
    }
    this.follow();
    this.unsaid += piece;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.announce(), PAUSE);
  }

  // A word of the user's, {text, start, end}.
  heard(word) {
    const last = this.log.lastElementChild;
    const said = this.words.hear(word);
    if (said.begins || !last?.classList.contains("user")) {
      this.log.querySelector(".hint")?.remove();
      const made = element("p", undefined, "user");
      made.append(element("time", clock(word.start)));
      this.log.append(made);
    }
    this.log.lastElementChild.append(element("b", word.text), " ");
    this.follow();
  }

  paragraph(word) {
    const last = this.log.lastElementChild;
    if (last?.dataset.number === String(word.paragraph)) return last;
    this.log.querySelector(".hint")?.remove();
    const made = element("p");
    made.dataset.number = word.paragraph;
    made.append(element("time", clock(word.start)));
    this.log.append(made);
    return made;
  }

  // The newest words stay in sight, unless someone scrolled up to read.
  follow() {
    if (this.pinned) this.log.scrollTop = this.log.scrollHeight;
  }

  // What was said, once it was said, not syllable by syllable.
  announce() {
    clearTimeout(this.timer);
    const text = this.unsaid.trim();
    this.unsaid = "";
    if (!text) return;
    this.announcer.append(element("p", text));
    while (this.announcer.children.length > 5) this.announcer.firstChild.remove();
  }
}
