"""Write `tests/golden/personaplex` by running NVIDIA's generator on a small random model.

Run it from the root of the repository with the Python of an environment that holds PyTorch, sphn and what NVIDIA's
package needs (`make reference` makes one), and with a checkout of github.com/NVIDIA/personaplex (3428dfd was used)::

    PYTHONPATH=personaplex/moshi python tests/golden/make_personaplex.py

Two conversations, greedy, 200 live frames each: with the codes of a recording as voice, and with the file of embeddings
that the first one saves. `columns` are the 17 tokens that each position reads, `out` the frames that come out. The
weights are not stored: :func:`random_weights` makes them from their names.
"""

from __future__ import annotations

import ast
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parent / "personaplex"
CARD, TEXT_CARD, CONTEXT, LIVE, PAUSE = 64, 48, 256, 200, 6
ROLE = [7, 11, 5, 20, 9]
CONFIG: dict[str, Any] = {
    "dim": 32,
    "text_card": TEXT_CARD,
    "existing_text_padding_id": 3,
    "n_q": 16,
    "dep_q": 16,
    "card": CARD,
    "num_heads": 2,
    "num_layers": 2,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": CONTEXT,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 16,
    "depformer_dim_feedforward": 66,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "depformer_context": 16,
    "depformer_pos_emb": "none",
    "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
}
WRAPPED = ["", "You sing.", "  You sing. ", "<system> You sing. <system>", "<system> open", "<system>"]


def random_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights by name, float32: the same everywhere."""
    weights = {}
    for name, shape in shapes.items():
        drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        value = 1 + 0.1 * drawn if name.endswith("alpha") else 1.5 * drawn / np.sqrt(shape[-1])
        weights[name] = value.astype(np.float32)
    return weights


def random_codes(frames: int, seed: int) -> np.ndarray:
    """Codes [frames, 8]."""
    return np.random.RandomState(seed).randint(0, CARD, (frames, 8))


def main() -> None:
    import torch
    from moshi.models import lm as reference
    from safetensors.numpy import save_file

    torch.set_num_threads(1)
    reference.SILENCE_TOKENS = reference.SILENCE_TOKENS % CARD
    reference.SINE_TOKENS = reference.SINE_TOKENS % CARD
    more = {
        "depformer_causal": True,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_weights_per_step": True,
    }
    model = reference.LMModel(device="cpu", dtype=torch.float32, **CONFIG, **more).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    weights = random_weights(shapes)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    voice, live = random_codes(7, 1), random_codes(LIVE, 2)
    saved: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {"silence": reference.SILENCE_TOKENS, "sine": reference.SINE_TOKENS}

    def generator() -> Any:
        made = reference.LMGen(
            model,
            device="cpu",
            use_sampling=False,
            audio_silence_frame_cnt=PAUSE,
            text_prompt_tokens=ROLE,
            save_voice_prompt_embeddings=True,
            sample_rate=24000,
        )
        made.streaming_forever(1)
        return made

    def keep(state: dict[str, Any], path: str) -> None:
        saved.update({name: value.clone().numpy() for name, value in state.items()})

    reference.torch.save = keep
    for name in ("recording", "saved"):
        made, columns, out = generator(), [], []
        if name == "recording":
            made.voice_prompt, made.voice_prompt_audio = "voice.wav", voice
            frames = [torch.from_numpy(frame.copy()).view(1, 8, 1) for frame in voice]
            made._encode_voice_prompt_frames = lambda mimi, frames=frames: iter(frames)
        else:
            made.voice_prompt_embeddings = torch.from_numpy(saved["embeddings"])
            made.voice_prompt_cache = torch.from_numpy(saved["cache"])
        prepare = made.prepare_step_input

        def noting(*args: Any, prepare: Any = prepare, columns: Any = columns, **named: Any) -> Any:
            prepared = prepare(*args, **named)
            if prepared is not None:
                columns.append(prepared[0][0, :, 0].clone().numpy())
            return prepared

        made.prepare_step_input = noting
        made._step_voice_prompt(None)
        arrays[f"{name}.ring"] = made._streaming_state.cache[0].clone().numpy()
        arrays[f"{name}.offset"] = np.array([made._streaming_state.offset])
        made._step_audio_silence()
        made._step_text_prompt()
        made._step_audio_silence()
        arrays[f"{name}.prompts"] = np.array([len(columns)])
        for frame in live:
            tokens = made.step(torch.from_numpy(frame.copy()).view(1, 8, 1))
            out.append(tokens[0, :, 0].numpy().copy())
        arrays[f"{name}.columns"], arrays[f"{name}.out"] = np.stack(columns), np.stack(out)
    arrays |= {f"voice.{name}": value for name, value in saved.items()}
    source = Path(reference.__file__).parents[1] / "server.py"
    (wrap,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "wrap_with_system_tags"
    )
    names: dict[str, Any] = {}
    exec(compile(ast.Module([wrap], []), str(source), "exec"), names)
    wrapped = {text: names["wrap_with_system_tags"](text) for text in WRAPPED}
    OUT.mkdir(exist_ok=True)
    kept = {
        name: np.ascontiguousarray(value if value.dtype == np.float32 else value.astype(np.int16))
        for name, value in arrays.items()
    }
    save_file(kept, str(OUT / "golden.safetensors"))
    (OUT / "golden.json").write_text(json.dumps({"shapes": shapes, "wrapped": wrapped}, indent=1) + "\n")
    for path in sorted(OUT.iterdir()):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
