"""``moshi-mlx-local voice``: a recording's voice as a file that PersonaPlex replays."""

from __future__ import annotations

import argparse
from pathlib import Path

from moshi_mlx_app.options import add_model_options
from moshi_mlx_app.recording.outputs import Output, reserved
from moshi_mlx_app.screen.terminal import say

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "write a recording's voice as a file (PersonaPlex)"
EXAMPLES = """\
examples:
  moshi-mlx-local voice anna.wav -o anna.safetensors --model nvidia/personaplex-7b-v1
  moshi-mlx-local talk --voice anna.safetensors --model nvidia/personaplex-7b-v1

Four seconds of one person who speaks are enough. A name that ends in .pt gives
the file that NVIDIA's program reads, too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options and the shared ones."""
    parser.add_argument("recording", metavar="RECORDING", help="a few seconds of speech; of several channels the first")
    parser.add_argument("-o", "--output", required=True, metavar="VOICE", help="a file .safetensors or .pt")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file. Returns the exit status."""
    import soundfile

    from moshi_mlx.errors import AudioError, ConfigError
    from moshi_mlx.tasks.personaplex import LONGEST_VOICE, PersonaPlex
    from moshi_mlx_app.models.fetch import load_model

    output = Path(args.output)
    if output.suffix not in (".pt", ".safetensors"):
        args.parser.error(f"-o {output}: a voice is a file; give it a name that ends in .safetensors or .pt")
    others = {"the recording": Path(args.recording)}
    partial = output.with_name(f".{output.name}.part")
    with reserved(args.parser, [Output("the voice", "-o", output, partial)], others=others, force=args.force):
        try:
            with soundfile.SoundFile(args.recording) as file:
                rate = file.samplerate
                pcm = file.read(int((LONGEST_VOICE + 1) * rate), dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise AudioError(f"{args.recording} cannot be read as a recording: {error}") from error
        model = load_model(args)
        if not isinstance(model, PersonaPlex):
            raise ConfigError(
                f"this model takes no voice: {model.name} is no PersonaPlex; name one with --model, such as "
                "nvidia/personaplex-7b-v1"
            )
        frames = model.save_voice(pcm, rate, output)
    say(f"{output}: {frames / model.frame_rate:.1f} s of a voice; use it with moshi-mlx-local talk --voice {output}")
    return 0
