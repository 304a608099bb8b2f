// Microphone, loudspeaker and the audio thread between them.

const WORDS = {
  NotAllowedError: "denied",
  SecurityError: "denied",
  NotFoundError: "nomic",
  OverconstrainedError: "nomic",
  NotReadableError: "busymic",
  AbortError: "busymic",
};

// `name` is one of insecure, old, denied, nomic, busymic.
export class SoundError extends Error {
  constructor(name, cause) {
    super(cause ? `${cause.name}: ${cause.message}` : name);
    this.name = name;
  }
}

export function missing() {
  if (!window.isSecureContext) return "insecure";
  const old = !navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode || !window.WebSocket;
  return old ? "old" : "";
}

export async function listDevices() {
  if (!navigator.mediaDevices?.enumerateDevices) return { microphones: [], speakers: [] };
  const all = await navigator.mediaDevices.enumerateDevices();
  // Without permission the browser hides names and ids: nothing to choose from yet.
  const of = (kind) => all.filter((each) => each.kind === kind && each.deviceId);
  return { microphones: of("audioinput"), speakers: of("audiooutput") };
}

export function canChooseSpeaker() {
  return "setSinkId" in (window.AudioContext?.prototype ?? {}) || "setSinkId" in HTMLMediaElement.prototype;
}

export class Sound {
  // on: {block(message of the audio thread), lost(), interrupted(bool)}. options: {microphone, speaker, echo, noise, gain}.
  constructor(rate, frame, on) {
    Object.assign(this, { rate, frame, on });
    this.closed = false;
  }

  // Ask for the microphone and start the audio thread. Throws SoundError.
  async open(options) {
    const reason = missing();
    if (reason) throw new SoundError(reason);
    const stream = await openMicrophone(options);
    try {
      await this.build(stream, options);
    } catch (error) {
      stop(stream);
      this.close();
      throw error instanceof SoundError ? error : new SoundError("old", error);
    }
    if (this.closed) this.close(); // given up while the browser was asking
  }

  async build(stream, options) {
    this.context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
    try {
      this.source = this.context.createMediaStreamSource(stream);
    } catch {
      // Firefox connects a microphone to contexts of its own rate alone: then the audio thread resamples.
      await this.context.close();
      this.context = new AudioContext({ latencyHint: "interactive" });
      this.source = this.context.createMediaStreamSource(stream);
    }
    const { context } = this;
    context.onstatechange = () => {
      if (!this.closed) this.on.interrupted(context.state !== "running");
    };
    await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    this.node = new AudioWorkletNode(context, "duplex", {
      numberOfInputs: 1,
      numberOfOutputs: 1,
      outputChannelCount: [1],
      processorOptions: { rate: this.rate, frame: this.frame },
    });
    this.node.port.onmessage = ({ data }) => this.on.block(data);
    this.node.connect(context.destination);
    this.follow(stream);
    await this.useSpeaker(options.speaker);
    if (context.state !== "running") await context.resume();
  }

  follow(stream) {
    if (this.stream) stop(this.stream);
    this.stream = stream;
    this.source.connect(this.node);
    const [track] = stream.getAudioTracks();
    track.onended = () => {
      if (this.stream === stream && !this.closed) this.on.lost();
    };
  }

  // Go on with another microphone, or other processing of the same. Throws SoundError; the old one goes on then.
  async useMicrophone(options) {
    const stream = await openMicrophone(options);
    const old = this.source;
    try {
      this.source = this.context.createMediaStreamSource(stream);
    } catch (error) {
      stop(stream);
      throw new SoundError("busymic", error);
    }
    old.disconnect();
    this.follow(stream);
  }

  // "" is the system's choice. Returns false where that speaker cannot be used.
  async useSpeaker(id = "") {
    try {
      if (this.context.setSinkId) {
        if (id || this.context.sinkId) await this.context.setSinkId(id);
      } else if (id || this.element) {
        await this.throughElement(id);
      }
      return true;
    } catch {
      return false;
    }
  }

  // Browsers that choose a speaker for media elements alone: some delay more, only for who chooses one.
  async throughElement(id) {
    if (!this.element) {
      if (!("setSinkId" in HTMLMediaElement.prototype)) return;
      const bridge = this.context.createMediaStreamDestination();
      this.element = new Audio();
      this.element.srcObject = bridge.stream;
      this.node.disconnect();
      this.node.connect(bridge);
      await this.element.play();
    }
    await this.element.setSinkId(id);
  }

  send(message, transfer = []) {
    this.node?.port.postMessage(message, transfer);
  }

  resume() {
    return this.context?.resume();
  }

  // Seconds that the hardware adds, as far as the browser knows.
  get hardware() {
    const input = this.stream?.getAudioTracks()[0]?.getSettings().latency ?? 0;
    return input + (this.context?.baseLatency ?? 0) + (this.context?.outputLatency ?? 0);
  }

  get microphone() {
    return this.stream?.getAudioTracks()[0]?.getSettings().deviceId ?? "";
  }

  close() {
    this.closed = true;
    if (this.stream) stop(this.stream);
    this.element?.pause();
    this.source?.disconnect();
    this.node?.disconnect();
    if (this.context && this.context.state !== "closed") this.context.close();
  }
}

async function openMicrophone({ microphone, echo = true, noise = true, gain = true }) {
  const audio = {
    channelCount: 1,
    echoCancellation: echo,
    noiseSuppression: noise,
    autoGainControl: gain,
    ...(microphone ? { deviceId: { exact: microphone } } : {}),
  };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    // The chosen one is not plugged in today: any other is better than none.
    if (microphone && WORDS[error.name] === "nomic") return openMicrophone({ echo, noise, gain });
    throw new SoundError(WORDS[error.name] ?? "busymic", error);
  }
}

function stop(stream) {
  for (const track of stream.getTracks()) {
    track.onended = null;
    track.stop();
  }
}
