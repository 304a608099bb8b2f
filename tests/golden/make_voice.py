"""Write `tests/golden/voice` with torch's own `torch.save`: what a PersonaPlex voice prompt looks like, in small.

Run it from the root of the repository with the Python of an environment that holds torch (2.13 was used)::

    python tests/golden/make_voice.py

`voice.pt` is the dict that PersonaPlex saves (`embeddings` bfloat16 [5, 1, 1, 16], `cache` int64 [1, 17, 4]), the first
being a transposed view so that strides matter. `module.pt` is a whole pickled module, which must be refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "voice"


def main() -> None:
    OUT.mkdir(exist_ok=True)
    gen = torch.Generator().manual_seed(1)
    embeddings = torch.randn(16, 1, 1, 6, generator=gen).to(torch.bfloat16).transpose(0, 3)[1:]
    cache = torch.randint(-1, 2049, (1, 17, 4), generator=gen)
    torch.save({"embeddings": embeddings, "cache": cache}, OUT / "voice.pt")
    save_file({"embeddings": embeddings.contiguous(), "cache": cache}, OUT / "voice.safetensors")
    torch.save(torch.nn.Linear(2, 2), OUT / "module.pt")


if __name__ == "__main__":
    main()
