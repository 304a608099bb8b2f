"""The model card: what was done to a checkpoint and what it cost; and the upload that takes it along."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moshi_mlx.checkpoint.resolve import CheckpointFiles
from moshi_mlx.errors import DownloadError
from moshi_mlx.printable import printable

from ..measure.report import Report
from ..plan.recipes import PARTS, RECIPES, Module, Plan, describe
from ..source import Source
from ..terminal import table
from .convert import Result

__all__ = ["model_card", "parts_table", "upload"]

_AGAIN = " The source is quantized itself: its own errors stay in the result, and no figure here counts them."


def parts_table(plan: Plan, result: Result, modules: Sequence[Module]) -> str:
    """Size, bits per weight and relative error of every part."""
    rows = []
    for part in PARTS:
        if part not in result.parts:
            continue
        size, weights, lost, norm = result.parts[part]
        kinds = {plan.choices.get(module.name) for module in modules if module.part == part}
        how = ", ".join(sorted({describe(kind) for kind in kinds})) or "dense"
        error = f"{(lost / norm) ** 0.5:.4f}" if norm and lost else "-"
        rows.append([part, how, f"{size / 1e6:,.2f}", f"{8 * size / max(1, weights):.2f}", error])
    return table(["part", "bits:group", "MB", "bits/weight", "rel. error"], rows)


def model_card(files: CheckpointFiles, plan: Plan, result: Result, source: Source, report: Report | None) -> str:
    """README.md of the result: front matter for the hub, recipe, sizes, and the cost where it was measured."""
    origin = files.source if files.revision is None else f"{files.source.split('@')[0]}@{files.revision}"
    name = printable(origin if files.revision is not None else Path(files.source).name)
    front = ["---", "library_name: moshi-mlx-local", "tags:", "- mlx", "- moshi"]
    if files.revision is not None:
        front.append(f"base_model: {files.source.split('@')[0]}")
    recipe = RECIPES.get(plan.name)
    what = f"Recipe `{plan.name}`" + (f": {recipe.text}." if recipe else ".")
    merged = ", with a LoRA merged in" if source.merged else ""
    lines = [
        *front, "---", "",
        f"# {name}, {'dense' if plan.name == 'dense' else 'quantized'}", "",
        f"Written by `moshi-mlx-quantize` from `{name}`{merged}. {what}", "",
        f"{result.bytes_after / 1e6:,.2f} MB of weights instead of {result.bytes_before / 1e6:,.2f} MB: "
        f"{result.bits_per_weight:.2f} bits per weight, scales, biases and norms counted. rel. error: how far "
        "the weights are from the source's, over their size." + (_AGAIN if source.quantized else ""), "",
        "```", parts_table(plan, result, source.modules), "```", "",
    ]  # fmt: skip
    if plan.skipped:
        lines += ["Dense although the recipe would quantize them, or conditions:", ""]
        lines += [f"- `{module}`: {reason}" for module, reason in sorted(plan.skipped.items())] + [""]
    lines += ["## Cost", ""]
    if report is None:
        lines += ["The outputs were not compared with the source's.", ""]
    else:
        lines += [f"Measured on {report.calibration}. {report.legend()}", "", "```", report.table(), "```", ""]
    lines += [
        "How every module is quantized is in config.json: nothing has to be told at load.",
        "The licence is the source's.",
        "",
    ]
    return "\n".join(lines)


def upload(folder: Path, repo: str) -> None:
    """Put the folder on the hub, making the repository if need be.

    Raises
    ------
    DownloadError
        If the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        made = api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Written by moshi-mlx-quantize")
    except Exception as error:  # huggingface_hub raises those of whatever carries its requests
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DownloadError(
            f"{folder} is complete, but could not be uploaded to {repo}: {first}. Log in with `hf auth login` or set "
            f"HF_TOKEN, and try `hf upload {repo} {folder}`"
        ) from error
