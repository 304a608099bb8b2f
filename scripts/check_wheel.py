"""Build the wheel, install it alone into an empty folder, and look at what appeared there.

Exactly four import packages may appear; what the library reads at run time must come along; and nothing that only the
repository needs may. Prints what it found and exits with 1 where something is wrong.

    python scripts/check_wheel.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = ["moshi_mlx", "moshi_mlx_app", "moshi_mlx_finetune", "moshi_mlx_quantize"]
FOLDERS = [
    ROOT / "moshi_mlx",
    ROOT / "app" / "moshi_mlx_app",
    ROOT / "finetune" / "moshi_mlx_finetune",
    ROOT / "quantize" / "moshi_mlx_quantize",
]
LARGEST_WHEEL = 60 * 2**20


def tracked_files() -> set[str]:
    """Files under version control in the four packages, as the wheel should name them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return {str(path.relative_to(folder.parent)) for path in paths for folder in FOLDERS if path.is_relative_to(folder)}


def check(installed: Path, wheel: Path) -> list[str]:
    """What is wrong, one line each."""
    wrong = []
    top = sorted(path.name for path in installed.iterdir() if not path.name.endswith(".dist-info"))
    # pip puts console scripts of a --target install into bin/.
    top = [name for name in top if name != "bin"]
    if top != EXPECTED:
        wrong.append(f"site-packages would hold {top}, not {EXPECTED}")
    files = {str(path.relative_to(installed)) for name in EXPECTED for path in (installed / name).rglob("*")}
    wrong += [f"missing from the wheel: {name}" for name in sorted(tracked_files() - files)]
    wrong += [f"no py.typed in {name}" for name in EXPECTED if f"{name}/py.typed" not in files]
    for script in ("moshi-mlx-local", "moshi-mlx-quantize", "moshi-mlx-finetune"):
        if not (installed / "bin" / script).exists():
            wrong.append(f"no console command {script}")
    if wheel.stat().st_size > LARGEST_WHEEL:
        wrong.append(f"the wheel has {wheel.stat().st_size:,} bytes, more than {LARGEST_WHEEL:,}")
    return wrong


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        built, installed = Path(folder, "built"), Path(folder, "installed")
        quiet = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(built), str(ROOT)], **quiet)
        (wheel,) = built.glob("*.whl")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", str(installed), str(wheel)], **quiet)
        wrong = check(installed, wheel)
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {', '.join(EXPECTED)}" if not wrong else wheel.name)
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
