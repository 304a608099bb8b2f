// What the page says in each state. Steps may hold `code` between backquotes.

// Questions that the built-in model was taught; others get what they get.
const IDEAS = ["What is your name?", "What is the capital of France?", "Tell me a joke.", "What is three plus four?"];

export const RECORDED = "This server keeps a recording of every conversation.";
export const STANDS_STILL = "Nothing comes from the computer that runs Moshi. What you say meanwhile is left out.";
export const CATCHING_UP = "Moshi is catching up.";
export const BEHIND = "The computer that runs Moshi does not keep up, so Moshi misses some of what you say.";

// Beside the QR code of a link for other devices.
export function elsewhere(link) {
  const encrypted = link.startsWith("https:");
  return encrypted ? "On a phone: scan this, or open" : "Other devices have no microphone for this link before you start Moshi with --tls:";
}

const ORDER = ["next", "second in line", "third in line", "fourth in line", "fifth in line"];

export function ready(info) {
  const small = info.model === "small";
  const taken = info.free === 0;
  return {
    headline: "Talk to Moshi",
    detail: taken
      ? "Somebody is talking to it just now. Start, and you wait in line."
      : "It listens while it speaks, so interrupt it whenever you like.",
    ideas: small ? IDEAS : [],
    main: "Start talking",
    notice: [
      info.trained === false ? "This model has random weights: it makes noise and means nothing." : "",
      info.recorded ? RECORDED : "",
    ].join(" ").trim(),
  };
}

export function asking(info) {
  return {
    headline: "May Moshi hear you?",
    detail: "Your browser asks for the microphone. What it hears goes to this page's own server and nowhere else.",
    main: "Cancel",
    notice: info.recorded ? RECORDED : "",
  };
}

export const connecting = { headline: "One moment", detail: "Moshi is getting ready.", main: "Cancel" };

export function waiting(place) {
  return {
    headline: `You are ${ORDER[place - 1] ?? `number ${place} in line`}`,
    detail: "Moshi is talking to somebody else. It turns to you by itself; nothing of your voice is sent before.",
    main: "Leave the line",
  };
}

export function ended(length, kept) {
  return {
    headline: length ? `You talked for ${length}` : "Nothing was said yet",
    detail: kept ? "The conversation is in this page only, until you save it or begin another." : "",
    main: "Talk again",
  };
}

const PORT = () => (location.port ? `:${location.port}` : "");

const ERRORS = {
  insecure: () => ({
    headline: "The microphone needs another address",
    detail: "Browsers lend it only to pages on this computer itself, or over https.",
    steps: [
      `On the computer where Moshi runs, open \`http://localhost${PORT()}/${location.search}\`.`,
      "For any other device, start it with `moshi-mlx-local web --host 0.0.0.0 --tls` and open the link that it prints.",
    ],
  }),
  old: () => ({
    headline: "This browser cannot do it",
    detail: "Moshi needs a microphone, AudioWorklet and WebSocket. Any current Safari, Chrome, Edge or Firefox has them.",
  }),
  denied: () => ({
    headline: "Moshi cannot hear you",
    detail: "The microphone was refused for this page.",
    steps: [
      "Allow it by the sign beside the address, then try again.",
      "On a Mac, System Settings > Privacy & Security > Microphone must also allow this browser.",
    ],
  }),
  nomic: () => ({
    headline: "There is no microphone",
    detail: "Plug one in, or switch on a headset, then try again.",
  }),
  busymic: () => ({
    headline: "The microphone does not start",
    detail: "Another program may hold it. Close that one, or choose another microphone in the settings.",
  }),
  gone: () => ({
    headline: "Moshi's server is gone",
    detail: "It was stopped, or cannot be reached any more.",
    steps: ["Start it again with `moshi-mlx-local web`, then try again."],
  }),
  busy: () => ({
    headline: "Everyone is talking to Moshi",
    detail: "All places are taken and the line is full. Try again in a while.",
  }),
  token: () => ({
    headline: "This link is missing its key",
    detail: "The server lets in who has the whole link, with the token at its end.",
    steps: ["Open the link that `moshi-mlx-local web` printed when it started."],
  }),
  refused: (detail) => ({ headline: "Moshi could not go on", detail: sentence(detail) }),
};

export function failed(name, detail = "") {
  return { main: "Try again", ...(ERRORS[name] ?? ERRORS.refused)(detail) };
}

// Why a connection ended, as one of the names above.
export function reasonOf({ reason, code, opened }) {
  if (/^busy/i.test(reason) || code === 1013) return "busy";
  if (!opened || code === 1006 || code === 1001) return "gone";
  return "refused";
}

function sentence(text) {
  const trimmed = text.trim() || "The server ended the conversation without a reason";
  const whole = trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
