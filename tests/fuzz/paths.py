"""Names where a person or a configuration gives one: of models, files, revisions and parts."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from moshi_mlx.checkpoint.download import HubRepo
from moshi_mlx.checkpoint.readers import read_json, read_tensors
from moshi_mlx.checkpoint.resolve import plan_download, resolve
from moshi_mlx.checkpoint.voices import list_voices, load_voice_prompt
from moshi_mlx.errors import MoshiError

from . import Attack, Attempt, fuzzer

_PIECES = [
    "..", ".", "~", "~nobody", "~root", "/", "//", "\\", "\0", "\n", " ", ":", "@", "@main", "@../..", "x" * 254,
    "x" * 300, "\ud800", "\udcff", "é", "𝄞", "\u202e", "\x1b[31m", "hf://", "file://", "file:///", "http://", "a/b",
    "org/name", "small", "config.json", "model.safetensors", "pipe", "loop", "closed", "%2e%2e", "%00", "$HOME", "*",
    "[", "-", "--", "CON", "C:", "model.safetensors.index.json", ".tgz", ".gguf", ".pt", "/dev/zero", "/dev/stdin",
    "/proc/self/mem", "'",
]  # fmt: skip
_KEYS = ["moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name"]


@fuzzer()
def paths(folder: Path) -> Attack:
    """Whatever a name is made of, it is found, or refused; what a configuration names is inside its folder."""
    os.chdir(folder)
    model = folder / "model"
    model.mkdir()
    for name in ("model.safetensors", "x", "tokenizer_spm_32k_3.model"):
        (model / name).write_bytes(b"x")
    (folder / "outside").write_bytes(b"x")
    for place in (folder, model):
        os.mkfifo(place / "pipe")
        (place / "loop").symlink_to("loop")
    (folder / "closed").mkdir(mode=0)
    cache = folder / "cache"

    def make(rng: random.Random) -> Attempt:
        text = "".join(
            rng.choice(_PIECES) + rng.choice(["", "", "/"]) for _ in range(rng.choice([1, 1, 2, 3, 8, 2000]))
        )
        key = rng.choice(_KEYS)

        def call() -> None:
            for read in (read_json, read_tensors, list_voices, load_voice_prompt):
                _refused(read, text)
            _refused(lambda text: HubRepo(text, cache=cache, offline=True).fetch([text]), text)
            for find in (resolve, plan_download):
                _refused(lambda text, find=find: find(text, cache=cache, offline=True), text)
            _refused(lambda text: resolve(model, weights=text, extras=[text]), text)
            (model / "config.json").write_text(json.dumps({key: text}))
            files = resolve(model, cache=cache, offline=True)
            for path in (*files.weights, files.mimi, files.mimi_config, files.tokenizer, files.lora):
                assert path is None or "file://" in text or model in path.resolve().parents, path

        return repr((key, text)).encode("utf-8", "surrogatepass"), call

    return make


def _refused(read: object, text: str) -> None:
    try:
        read(text)  # type: ignore[operator]
    except MoshiError as error:
        assert 0 < len(str(error)) < 2000
