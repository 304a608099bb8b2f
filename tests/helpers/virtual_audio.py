"""A sound card without hardware: a virtual microphone and loudspeaker of a PulseAudio that runs for one test only.

Needs Debian's ``pulseaudio pulseaudio-utils libasound2-plugins libportaudio2``, or their like. Programs started with
:attr:`VirtualAudio.environment` see two devices, ``pulse`` and ``default``. They hear what is written to
:meth:`VirtualAudio.microphone`; what they play comes out of :meth:`VirtualAudio.loudspeaker`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

__all__ = ["VirtualAudio", "unavailable"]

RATE = 24_000
_MODULES = """\
load-module module-native-protocol-unix auth-anonymous=1 socket={socket}
load-module module-null-sink sink_name=into_mic rate=24000 channels=1
load-module module-remap-source master=into_mic.monitor source_name=mic
load-module module-null-sink sink_name=speaker rate=24000 channels=1
set-default-source mic
set-default-sink speaker
"""


def unavailable() -> str:
    """Why it cannot run here; empty if it can."""
    missing = [name for name in ("pulseaudio", "pactl", "pacat", "parec") if shutil.which(name) is None]
    if missing:
        return f"no virtual sound card: {', '.join(missing)} not installed (pulseaudio, pulseaudio-utils)"
    from ctypes.util import find_library

    if find_library("portaudio") is None:
        return "no virtual sound card: PortAudio is not installed (libportaudio2)"
    folders = [Path("/usr/lib"), Path("/usr/lib64")]
    if not any(next(folder.glob("**/alsa-lib/libasound_module_pcm_pulse.so"), None) for folder in folders):
        return "no virtual sound card: ALSA's plugin for PulseAudio is not installed (libasound2-plugins)"
    return ""


class VirtualAudio:
    """The daemon and its two devices.

    Parameters
    ----------
    folder : path
        For its files; a short path, because a socket lives there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemon: subprocess.Popen[bytes] | None = None
        (folder / "run").mkdir(parents=True, mode=0o700)
        (folder / "state").mkdir()
        (folder / "modules.pa").write_text(_MODULES.format(socket=folder / "socket"))
        (folder / "daemon.conf").write_text(
            "default-sample-rate = 24000\ndefault-sample-channels = 1\navoid-resampling = yes\nflat-volumes = no\n"
        )
        (folder / "asoundrc").write_text(
            "pcm.pulse { type pulse }\npcm.!default { type pulse }\nctl.!default { type pulse }\n"
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PULSE_")},
            "PULSE_RUNTIME_PATH": str(folder / "run"),
            "PULSE_STATE_PATH": str(folder / "state"),
            "PULSE_COOKIE": str(folder / "cookie"),
            "PULSE_SERVER": f"unix:{folder / 'socket'}",
            "PULSE_CONFIG": str(folder / "daemon.conf"),
            "ALSA_CONFIG_PATH": f"/usr/share/alsa/alsa.conf:{folder / 'asoundrc'}",
        }

    def start(self) -> None:
        """Start the daemon; raises TimeoutError with its last words if it does not come up."""
        command = ["pulseaudio", "-n", "--daemonize=no", "--disallow-exit", "--exit-idle-time=-1", "--use-pid-file=no"]
        log = self.folder / "log"
        with open(log, "wb") as words:
            self._daemon = subprocess.Popen(
                [*command, "-F", str(self.folder / "modules.pa")], env=self.environment, stderr=words
            )
        end = time.monotonic() + 10
        while subprocess.run(["pactl", "info"], env=self.environment, capture_output=True).returncode:
            if time.monotonic() > end or self._daemon.poll() is not None:
                raise TimeoutError(f"pulseaudio does not start: {log.read_text()[-500:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Pull the plug: every device is gone at once."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def microphone(self) -> subprocess.Popen[bytes]:
        """A process whose standard input, 16-bit samples at 24 kHz, is heard by the microphone."""
        return self._pipe("pacat", "-p", "-d", "into_mic", stdin=subprocess.PIPE)

    def loudspeaker(self, source: str = "speaker.monitor") -> subprocess.Popen[bytes]:
        """A process whose standard output, 16-bit samples at 24 kHz, is what the loudspeaker plays."""
        return self._pipe("parec", "-d", source, stdout=subprocess.PIPE)

    def _pipe(self, program: str, *options: str, **pipes: int) -> subprocess.Popen[bytes]:
        shape = ["--raw", "--format=s16le", f"--rate={RATE}", "--channels=1", "--latency-msec=20"]
        return subprocess.Popen([program, *options, *shape], env=self.environment, bufsize=0, **pipes)  # type: ignore[call-overload,no-any-return]
