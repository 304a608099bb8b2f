"""``moshi-mlx-local devices``: list the sound devices."""

from __future__ import annotations

import argparse
import json

from moshi_mlx.printable import printable
from moshi_mlx_app.screen.terminal import say

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "list microphones and loudspeakers"
EXAMPLES = """\
examples:
  moshi-mlx-local devices
  moshi-mlx-local devices --json
  moshi-mlx-local talk --input-device 3 --output-device headset
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")


def run(args: argparse.Namespace) -> int:
    """Print the list. Returns the exit status."""
    from moshi_mlx_app.audio.portaudio import devices

    found = devices()
    if args.json:
        say(json.dumps([device.as_dict() for device in found]))
        return 0
    if not found:
        say("no sound device was found")
        return 0
    width = max(len(printable(device.name)) for device in found)
    for device in found:
        marks = [
            text
            for text, is_set in (
                ("default microphone", device.default_input),
                ("default loudspeaker", device.default_output),
            )
            if is_set
        ]
        say(
            f"{device.index:3}  {printable(device.name):{width}}  {device.inputs:2} in  {device.outputs:2} out  "
            f"{device.rate:6.0f} Hz  {device.host}{'  ' if marks else ''}{', '.join(marks)}"
        )
    return 0
