"""Tune the decoder to the answering voice; what makes the codes stays as it is.

    python -m moshi_mlx_training.codec.finetune runs/data runs/codec

starts from ``codec.pt``, or from a published file with ``--start-from``, and writes ``finetuned.pt``. Codes made before
stay valid, so a language model can be trained meanwhile. A share of other voices keeps their resynthesis intelligible.
Stops, goes on and finishes as the codec's training does.
"""

from __future__ import annotations

from collections.abc import Sequence

from moshi_mlx_training.codec.train import parser_for, train
from moshi_mlx_training.process import keep_memory


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("finetune", __doc__.split("\n")[0], 4e-4, 0.8)
    parser.add_argument(
        "--adversarial",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="train against a judge of spectrograms, whose gradient has this share of the plain loss's (0: none)",
    )
    options = parser.parse_args(arguments)
    options.stage = "decoder"
    keep_memory()
    train(options)


if __name__ == "__main__":
    main()
