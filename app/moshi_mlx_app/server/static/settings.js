// The settings panel, and what is remembered of it from one visit to the next.

import { canChooseSpeaker, listDevices } from "./sound.js";

const SAMPLING = ["text_temperature", "text_topk", "audio_temperature", "audio_topk", "seed"];
const PROMPTS = ["text_prompt", "voice_prompt"];
const SOUND = ["echo", "noise", "gain"];
const STORE = "moshi-settings";

const byId = (id) => document.getElementById(id);

export class SettingsPanel {
  // on: {sound(), speaker(id), keep(bool), anew()}: what was changed.
  constructor(on) {
    this.on = on;
    this.dialog = byId("settings");
    this.values = { microphone: "", speaker: "", echo: true, noise: true, gain: true, keep: true, sampling: {}, prompts: {} };
    try {
      Object.assign(this.values, JSON.parse(localStorage.getItem(STORE) ?? "{}"));
    } catch {
      // Storage may be forbidden, or hold something else: then nothing is remembered.
    }
    if (typeof this.values.sampling !== "object" || !this.values.sampling) this.values.sampling = {};
    if (typeof this.values.prompts !== "object" || !this.values.prompts) this.values.prompts = {};
    this.standard = {};
    this.prompts = null;
    this.listen();
  }

  listen() {
    byId("open-settings").addEventListener("click", () => this.open());
    this.dialog.addEventListener("click", (event) => {
      const { left, right, top, bottom } = this.dialog.getBoundingClientRect();
      const beside = event.clientX < left || event.clientX > right || event.clientY < top || event.clientY > bottom;
      if (event.target === this.dialog && beside) this.dialog.close();
    });
    for (const id of [...SOUND, "keep"]) {
      byId(id).checked = this.values[id] !== false;
      byId(id).addEventListener("change", ({ target }) => {
        this.remember(id, target.checked);
        if (id === "keep") this.on.keep(target.checked);
        else this.on.sound();
      });
    }
    for (const id of ["microphone", "speaker"]) {
      byId(id).addEventListener("change", ({ target }) => {
        this.remember(id, target.value);
        if (id === "speaker") this.on.speaker(target.value);
        else this.on.sound();
      });
    }
    for (const id of SAMPLING) {
      byId(id).addEventListener("input", ({ target }) => {
        if (target.value === "" || !target.validity.valid) delete this.values.sampling[id];
        else this.values.sampling[id] = Number(target.value);
        this.remember("sampling", this.values.sampling);
        this.showNumber(id);
      });
    }
    for (const id of PROMPTS) {
      byId(id).addEventListener("change", ({ target }) => {
        this.values.prompts[id] = target.value;
        this.remember("prompts", this.values.prompts);
      });
    }
    byId("defaults").addEventListener("click", () => {
      this.remember("sampling", {});
      this.showSampling();
    });
    byId("anew").addEventListener("click", () => {
      this.dialog.close();
      this.on.anew();
    });
    navigator.mediaDevices?.addEventListener?.("devicechange", () => this.showDevices());
  }

  remember(name, value) {
    this.values[name] = value;
    try {
      localStorage.setItem(STORE, JSON.stringify(this.values));
    } catch {
      // As above.
    }
  }

  async open() {
    this.dialog.showModal();
    await this.showDevices();
  }

  // What the server would do by itself, and what it is.
  know(info) {
    this.standard = info.sampling ?? {};
    this.showSampling();
    this.prompts = info.prompts ?? null;
    this.showPrompts();
    const places = info.places === 1 ? "one at a time" : `${info.places} at a time`;
    const rows = { Model: info.model, Program: info.version, "Talks with": places };
    byId("about").replaceChildren(
      ...Object.entries(rows).flatMap(([name, value]) => [element("dt", name), element("dd", value ?? "")]),
    );
  }

  // Only what was changed here: for the rest the server has its own.
  sampling() {
    const chosen = Object.entries(this.values.sampling);
    const real = chosen.filter(([name, value]) => SAMPLING.includes(name) && Number.isFinite(value));
    return Object.fromEntries(real.map(([name, value]) => [name, String(value)]));
  }

  // Role and voice, of a model that takes them; what was not changed here is the server's.
  roles() {
    const { text_prompt: role, voice_prompt: voice } = this.values.prompts;
    const chosen = {};
    if (!this.prompts) return chosen;
    if (typeof role === "string") chosen.text_prompt = role.slice(0, this.prompts.longest);
    if (this.prompts.voices.includes(voice)) chosen.voice_prompt = voice;
    return chosen;
  }

  showPrompts() {
    byId("prompts").hidden = !this.prompts;
    if (!this.prompts) return;
    const { text_prompt: role, voice_prompt: voice } = this.values.prompts;
    byId("text_prompt").maxLength = this.prompts.longest;
    byId("text_prompt").value = typeof role === "string" ? role : this.prompts.role;
    const names = [["", "As the server has it"], ...this.prompts.voices.map((name) => [name, name])];
    byId("voice_prompt").replaceChildren(...names.map(([value, label]) => new Option(label, value)));
    byId("voice_prompt").value = this.prompts.voices.includes(voice) ? voice : "";
  }

  showSampling() {
    for (const id of SAMPLING) {
      const value = this.values.sampling[id] ?? this.standard[id];
      byId(id).value = value ?? "";
      this.showNumber(id);
    }
  }

  showNumber(id) {
    const output = document.querySelector(`output[for="${id}"]`);
    if (output) output.value = Number(byId(id).value).toFixed(2);
  }

  talking(on) {
    byId("anew").hidden = !on;
  }

  async showDevices() {
    const { microphones, speakers } = await listDevices();
    fill(byId("microphone"), microphones, this.values.microphone, "Microphone");
    fill(byId("speaker"), speakers, this.values.speaker, "Speaker");
    byId("speaker").disabled = !canChooseSpeaker();
    byId("speaker-note").hidden = canChooseSpeaker();
  }
}

function fill(select, devices, chosen, name) {
  const first = new Option("The system's choice", "");
  const rest = devices
    .filter(({ deviceId }) => !["default", "communications"].includes(deviceId))
    .map(({ deviceId, label }, i) => new Option(label || `${name} ${i + 1}`, deviceId));
  select.replaceChildren(first, ...rest);
  select.value = rest.some((option) => option.value === chosen) ? chosen : "";
}

export function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}
