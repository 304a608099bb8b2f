// The page: its states, and what goes from where to where.
//
//   loading > ready > asking > connecting > (waiting) > talking > ended
//                 anything that fails > failed, with what to do

import { Recording, clock, save } from "./keep.js";
import { Log } from "./log.js";
import { SettingsPanel, element } from "./settings.js";
import { Shape } from "./shape.js";
import { Sound, SoundError, missing } from "./sound.js";
import * as states from "./states.js";
import { Traces } from "./traces.js";
import { Wire, address, askInfo } from "./wire.js";

const byId = (id) => document.getElementById(id);

const page = {
  state: "loading",
  info: null,
  metadata: null,
  sound: null,
  wire: null,
  muted: false,
  recording: null,
  coming: [], // pieces of text whose sound has not been played yet
  received: 0, // samples of Moshi's
  block: null, // the last figures of the audio thread
  stats: null,
  behind: [], // seconds that were dropped, at the last figures
  still: false, // whether the server stands still
  resumed: -Infinity, // when it last went on, ms
  name: "", // of the files to save
};

const log = new Log(byId("log"), byId("announcer"));
const shape = new Shape(byId("shape"));
const traces = new Traces(byId("traces"));
const panel = new SettingsPanel({
  sound: () => changeMicrophone(),
  speaker: (id) => changeSpeaker(id),
  keep: (on) => {
    if (!on) page.recording = null;
    else if (page.state === "talking") notice("The recording begins with the next conversation.");
  },
  anew: () => start(),
});

// ------------------------------------------------------------------------------------------------------------ states

function show(state, content = {}) {
  page.state = state;
  document.body.dataset.state = state;
  const talking = state === "talking";
  const over = ["ended", "failed"].includes(state);
  byId("lead").hidden = talking;
  byId("log").hidden = !talking && !(over && !log.empty);
  byId("time").hidden = !talking && !(over && page.block);
  byId("saves").hidden = !over || !page.block;
  byId("save-sound").hidden = !page.recording?.frames;
  byId("headline").textContent = content.headline ?? "";
  byId("detail").textContent = content.detail ?? "";
  byId("detail").hidden = !content.detail;
  byId("elsewhere").hidden = state !== "ready" || !page.info?.link;
  list(byId("ideas"), content.ideas ?? []);
  list(byId("steps"), content.steps ?? []);
  byId("main-name").textContent = content.main ?? "End";
  byId("main").disabled = state === "loading";
  byId("mute").disabled = !talking;
  panel.talking(talking);
  shape.mood = { asking: "wait", connecting: "wait", waiting: "wait", failed: "over", ended: "over" }[state] ?? "talk";
  if (!talking) shape.quieten();
  notice(content.notice ?? "");
  document.title = content.headline && state !== "ready" ? `${content.headline} · Moshi` : "Moshi";
}

function list(target, lines) {
  target.hidden = !lines.length;
  target.replaceChildren(
    ...lines.map((line) => {
      const item = element("li");
      line.split("`").forEach((part, i) => item.append(i % 2 ? element("code", part) : part));
      return item;
    }),
  );
}

let noticeEnd;
function notice(text, { bad = false, seconds = 0 } = {}) {
  clearTimeout(noticeEnd);
  byId("notice").textContent = text;
  byId("notice").classList.toggle("bad", bad);
  if (seconds) noticeEnd = setTimeout(() => notice(page.muted ? MUTED : ""), seconds * 1000);
}

function fail(name, detail) {
  finish();
  show("failed", states.failed(name, detail));
  byId("headline").focus();
}

async function load() {
  show("loading");
  const { info, error, detail } = await askInfo();
  if (error) return fail(error, detail);
  page.info = info;
  byId("model").textContent = info.model;
  panel.know(info);
  if (info.link) showLink(info.link);
  const reason = missing();
  if (reason) return fail(reason);
  show("ready", states.ready(info));
  return undefined;
}

// Where the server can be reached from elsewhere, this computer's page shows the way.
function showLink(link) {
  byId("elsewhere-code").src = address("/api/link.svg");
  byId("elsewhere-how").textContent = states.elsewhere(link);
  byId("elsewhere-link").textContent = link;
  byId("elsewhere-link").href = link;
}

// ------------------------------------------------------------------------------------------------------ conversation

async function start() {
  finish();
  forget();
  show("asking", states.asking(page.info));
  const { sample_rate: rate, frame_samples: frame } = page.info;
  const sound = new Sound(rate, frame, { block, lost: microphoneLost, interrupted });
  page.sound = sound;
  try {
    await sound.open(panel.values);
  } catch (error) {
    if (page.sound === sound) fail(error instanceof SoundError ? error.name : "old", error.message);
    return;
  }
  if (page.sound !== sound) return sound.close();
  connect();
  panel.showDevices();
  return undefined;
}

function connect() {
  show("connecting", states.connecting);
  page.wire = new Wire({ ...panel.sampling(), ...panel.roles() }, {
    begun: (metadata) => begin(metadata),
    sound: (samples) => {
      page.received += samples.length;
      page.sound?.send({ kind: "pcm", samples }, [samples.buffer]);
    },
    event,
    closed: async (end) => {
      const why = states.reasonOf(end);
      if (end.opened || why !== "gone") return fail(why, end.reason);
      // The browser does not say why a socket was refused; a plain request does.
      finish();
      const { error, detail } = await askInfo();
      return fail(error ?? "refused", detail ?? "The server refused to talk.");
    },
  });
}

function begin(metadata) {
  page.metadata = metadata;
  page.recording = panel.values.keep ? new Recording(metadata.sample_rate) : null;
  byId("model").textContent = metadata.model;
  page.name = `moshi-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}`;
  log.hint(metadata.recorded ? `Say hello. ${states.RECORDED}` : "Say hello.");
  traces.reset();
  page.sound.send({ kind: "start" });
  show("talking");
  byId("mute").focus({ preventScroll: true });
  stayAwake(true);
}

async function again() {
  const known = Boolean(page.info);
  await load();
  if (page.state === "ready" && known) await start();
}

// The end of whatever goes on; what was kept stays.
function finish() {
  page.wire?.leave();
  page.sound?.close();
  page.wire = null;
  page.sound = null;
  for (const { piece } of page.coming.splice(0)) log.add(piece, (page.block?.captured ?? 0) / page.info.sample_rate);
  log.announce();
  setMuted(false);
  traces.stop();
  stayAwake(false);
}

function end() {
  const talked = page.state === "talking";
  finish();
  if (!talked) return show("ready", states.ready(page.info));
  const seconds = (page.block?.captured ?? 0) / page.metadata.sample_rate;
  show("ended", states.ended(spoken(seconds), Boolean(page.recording?.frames)));
  byId("main").focus({ preventScroll: true });
  return undefined;
}

function forget() {
  Object.assign(page, { recording: null, metadata: null, block: null, stats: null, received: 0, behind: [], still: false });
  log.clear();
  for (const [id, text] of [["delay", "–"], ["late", "0"], ["dropped", "0 s"], ["elapsed", "0:00"]]) {
    byId(id).textContent = text;
    byId(id).classList.remove("bad");
  }
}

function event(what) {
  if (what.type === "queue") {
    show("waiting", states.waiting(what.place));
  } else if (what.type === "opening") {
    const detail = `Moshi is told its role: ${what.done} of ${what.total}.`;
    show("connecting", { ...states.connecting, detail });
  } else if (what.type === "stats") {
    page.stats = what;
  } else if (what.type === "text") {
    // It came behind its frame's sound: it belongs to where that frame begins, once that is played.
    const at = Math.max(0, page.received - page.info.frame_samples);
    page.coming.push({ piece: what.text });
    page.sound?.send({ kind: "mark", at });
  } else if (what.type === "user") {
    for (const word of what.words) log.heard(word);
  }
}

// From the audio thread, every 16 ms.
function block(message) {
  if ("mark" in message) {
    const next = page.coming.shift();
    if (next) log.add(next.piece, message.at / page.info.sample_rate);
    return;
  }
  const { user, moshi, userLevel, moshiLevel, talking } = message;
  shape.hear(userLevel, moshiLevel);
  page.wire?.present();
  if (!talking || page.state !== "talking") return;
  page.wire?.sendSound(user);
  page.recording?.add(moshi, user);
  traces.hear(userLevel, moshiLevel, page.muted, message.underruns > (page.block?.underruns ?? 0));
  page.block = message;
}

// ----------------------------------------------------------------------------------------------------------- figures

setInterval(() => {
  const { block: now, stats, wire } = page;
  if (page.state !== "talking" || !now) return;
  const rate = page.metadata.sample_rate;
  byId("elapsed").textContent = clock(now.captured / rate);
  if (wire.still) {
    if (!page.still) notice(states.STANDS_STILL, { bad: true });
    page.still = true;
    byId("delay").textContent = "–";
    return;
  }
  if (page.still) {
    Object.assign(page, { still: false, resumed: performance.now() });
    notice(states.CATCHING_UP, { seconds: 5 });
  }
  const lost = (stats?.dropped_samples ?? 0) + wire.unsent;
  if (now.begun) {
    // What is played now answers what was heard this long ago; the hardware's own delay on top.
    const seconds = (now.captured - now.played - lost) / rate + page.sound.hardware;
    byId("delay").textContent = `${Math.max(0, Math.round(seconds * 100) * 10)} ms`;
  }
  figure("late", (stats?.late_frames ?? 0) + now.underruns, String);
  figure("dropped", (lost + now.dropped) / rate, (seconds) => `${seconds.toFixed(1)} s`);
  if (performance.now() - page.resumed < 5000) page.behind = []; // what was lost before is no news
  complain(lost / rate);
  if (page.recording?.full) notice("The recording is as long as it can be: what follows is not kept.");
}, 250);

// Some seconds lost in the last ten: say whose fault it is.
function complain(lost) {
  page.behind.push(lost);
  if (page.behind.length > 40) page.behind.shift();
  if (lost - page.behind[0] < 2) return;
  page.behind = [];
  notice(states.BEHIND, { bad: true, seconds: 9 });
}

function figure(id, value, write) {
  byId(id).textContent = write(value);
  byId(id).classList.toggle("bad", value > 0);
}

function spoken(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return whole ? `${whole} seconds` : "";
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

// ----------------------------------------------------------------------------------------------------- mute, devices

const KEYS = matchMedia("(hover: hover)").matches; // else a phone, most likely: no Space to press
const MUTED = `Muted: Moshi hears silence.${KEYS ? " Space, or the button, to be heard again." : ""}`;

function setMuted(on) {
  if (page.muted === on) return;
  page.muted = on;
  page.sound?.send({ kind: "mute", on });
  page.wire?.sendEvent({ type: on ? "mute" : "unmute" });
  document.body.classList.toggle("muted", on);
  byId("mute").setAttribute("aria-pressed", String(on));
  byId("lane-user").textContent = on ? "Muted" : "You";
  shape.mood = on ? "deaf" : "talk";
  notice(on ? MUTED : "");
}

async function changeMicrophone() {
  if (!page.sound?.node) return;
  try {
    await page.sound.useMicrophone(panel.values);
    notice("Moshi hears you by that microphone now.", { seconds: 4 });
  } catch (error) {
    notice(states.failed(error.name).detail, { bad: true, seconds: 8 });
  }
}

async function changeSpeaker(id) {
  if (page.sound?.node && !(await page.sound.useSpeaker(id))) {
    notice("That speaker cannot be used.", { bad: true, seconds: 8 });
  }
}

async function microphoneLost() {
  notice("The microphone is gone. Looking for another.", { bad: true });
  try {
    await page.sound.useMicrophone({ ...panel.values, microphone: "" });
    notice("The microphone was unplugged; Moshi hears you by another one now.", { seconds: 8 });
  } catch {
    notice("The microphone is gone. Plug it in again.", { bad: true });
    const look = () => page.state === "talking" && microphoneLost();
    navigator.mediaDevices.addEventListener("devicechange", look, { once: true });
  }
}

function interrupted(on) {
  if (on) {
    notice("The system took the sound away. Press anywhere, or any key, to go on.", { bad: true });
    for (const press of ["pointerdown", "keydown"]) {
      addEventListener(press, () => page.sound?.resume(), { once: true });
    }
  } else {
    notice(page.muted ? MUTED : "");
  }
}

let lock = null;
async function stayAwake(on) {
  try {
    if (on && (!lock || lock.released)) lock = await navigator.wakeLock?.request("screen");
    else if (!on && lock) await lock.release();
  } catch {
    // Not allowed now (on battery, in the background): the screen may sleep, the conversation goes on.
  }
  if (!on) lock = null;
}
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && page.state === "talking") stayAwake(true);
});

// -------------------------------------------------------------------------------------------------------------- keys

byId("main").addEventListener("click", () => {
  if (["ready", "ended"].includes(page.state)) start();
  else if (page.state === "failed") again();
  else end();
});
byId("mute").addEventListener("click", () => setMuted(!page.muted));

addEventListener("keydown", (press) => {
  if (byId("settings").open || press.ctrlKey || press.metaKey || press.altKey) return;
  if (press.code === "Space" && page.state === "talking" && !press.target.closest("button, input, select")) {
    press.preventDefault();
    if (!press.repeat) setMuted(!page.muted);
  } else if (press.code === "Escape" && !["loading", "ready", "ended", "failed"].includes(page.state)) {
    end();
  }
});

byId("save-sound").addEventListener("click", () => save(page.recording.wav(), `${page.name}.wav`));
byId("save-text").addEventListener("click", () => save(new Blob([log.words.text()]), `${page.name}.txt`));
byId("save-json").addEventListener("click", () => {
  const seconds = page.block.captured / page.metadata.sample_rate;
  const json = log.words.json(page.metadata.transcript, `${page.name}.wav`, seconds, page.state === "ended");
  save(new Blob([json], { type: "application/json" }), `${page.name}.json`);
});

addEventListener("pagehide", () => finish());
addEventListener("beforeunload", (leaving) => {
  if (page.state === "talking") leaving.preventDefault();
});

load();
