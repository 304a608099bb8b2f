"""Write `tests/golden/complete.json` with Hugging Face's transformers: what Helium says after a prompt, greedily.

Run it from the root of the repository with the Python of an environment that holds torch and transformers (torch 2.13
and transformers 5.23 were used, on a CPU)::

    python tests/golden/make_complete.py

The models are those of `tests/golden/lm/helium` and `helium_tied`, which are in transformers' own layout. Nothing of
this project is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import HeliumForCausalLM

FOLDER = Path(__file__).parent / "lm"
OUT = Path(__file__).parent / "complete.json"
LENGTHS, TOKENS = (1, 2, 7, 16), 24
MIN_GAP = 5e-4  # least distance between the two best logits of any decision


def continued(model: HeliumForCausalLM, prompt: list[int]) -> tuple[list[int], float]:
    """The greedy continuation and the smallest gap between the two best logits; end of text does not stop it."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.cat(out.logits).float().topk(2, dim=-1).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def main() -> None:
    told: dict[str, Any] = {}
    for name in ("helium", "helium_tied"):
        model = HeliumForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()
        gen = torch.Generator().manual_seed(7)
        runs = []
        while len(runs) < len(LENGTHS):
            length = LENGTHS[len(runs)]
            prompt = [1, *torch.randint(4, model.config.vocab_size, (length,), generator=gen).tolist()]
            tokens, gap = continued(model, prompt)
            if gap > MIN_GAP:
                runs.append({"prompt": prompt, "greedy": tokens, "smallest_gap": gap})
        told[name] = runs
        print(name, [(len(run["prompt"]), run["smallest_gap"]) for run in runs])
    OUT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
