"""Which package may import which. docs/architecture.md describes the order; here the source is checked against it.

app -> moshi_mlx <- quantize, finetune  these three never meet; training may use all, and nothing that ships uses it
errors, disk, schema, config, tokens, state, audio < layers < models < cpu, checkpoint < codec < engine
  < sharding, tasks < realtime, loading
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "moshi_mlx": ROOT / "moshi_mlx",
    "moshi_mlx_app": ROOT / "app" / "moshi_mlx_app",
    "moshi_mlx_quantize": ROOT / "quantize" / "moshi_mlx_quantize",
    "moshi_mlx_finetune": ROOT / "finetune" / "moshi_mlx_finetune",
    "moshi_mlx_training": ROOT / "training" / "moshi_mlx_training",
}

# The library's packages from the bottom up, and exactly what each imports of those below it.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "disk": set(),
    "printable": set(),
    "schema": {"errors"},
    "config": {"errors", "schema"},
    "tokens": set(),
    "state": {"disk", "errors"},
    "audio": {"errors"},
    "loudness": {"errors"},
    "layers": {"config", "errors", "state"},
    "models": {"config", "errors", "layers", "schema", "state", "tokens"},
    "cpu": {"config", "errors", "layers", "models", "state"},
    "checkpoint": {"config", "disk", "errors", "models", "printable"},
    "codec": {"checkpoint", "cpu", "errors", "models", "state"},
    "engine": {"audio", "codec", "config", "cpu", "errors", "layers", "models", "state"},
    "sharding": {"checkpoint", "config", "cpu", "engine", "errors", "layers", "models", "state"},
    "tasks": {"audio", "checkpoint", "codec", "config", "engine", "errors", "layers", "loudness", "models"},
    "realtime": {"audio", "engine", "errors", "state", "tasks"},
    "loading": {"checkpoint", "codec", "config", "cpu", "engine", "errors", "models", "sharding", "tasks"},
}
# Commands: `python -m moshi_mlx`, and a hint for users of Kyutai's package.
COMMANDS = {"__main__", "local"}
HEAVY = {"huggingface_hub", "mlx_lm", "rustymimi", "sentencepiece", "sounddevice", "soundfile", "torch", "transformers"}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of a package."""
    folder = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(name: str, path: Path, *, at_load: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted target) of every import; with ``at_load`` only of those that run when the module is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if at_load and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_load and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            # `from moshi_mlx import lm` imports moshi_mlx.models.lm where that is a module.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        else:
            waiting += ast.iter_child_nodes(node)


def room(target: str) -> str | None:
    """The library's package that a dotted name is in, None outside the library or at its top."""
    parts = target.split(".")
    if parts[0] != "moshi_mlx" or len(parts) < 2:
        return None
    folder = PACKAGES["moshi_mlx"]
    exists = (folder / parts[1]).is_dir() or (folder / f"{parts[1]}.py").exists()
    return parts[1] if exists else None


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    """If this fails, the tests below pass because they see nothing."""
    path = tmp_path / "example.py"
    path.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e as f\n"
        "if TYPE_CHECKING:\n    import g\nelse:\n    import h\n"
        "class K:\n    import i\n    def m(self):\n        import j\n"
        "try:\n    import k\nexcept ImportError:\n    pass\n"
    )
    seen = {target for _, target in imports("moshi_mlx.layers.example", path)}
    assert seen == {"a.b", "moshi_mlx.layers.c", "moshi_mlx.d.e", *"ghijk"}
    assert {t for _, t in imports("moshi_mlx.layers.example", path, at_load=True)} == seen - {"g", "j"}
    assert room("moshi_mlx.layers.attention") == "layers" and room("moshi_mlx.load") is None


PROGRAMS = ("moshi_mlx_app", "moshi_mlx_quantize", "moshi_mlx_finetune")


@pytest.mark.parametrize("package", PROGRAMS)
def test_the_programs_never_meet(package: str) -> None:
    """If this fails, the programs can no longer be changed or shipped apart."""
    for name, path in modules(package):
        for line, target in imports(name, path):
            assert target.split(".")[0] not in set(PROGRAMS) - {package}, f"{path}:{line} imports {target}"


def test_the_library_knows_no_program() -> None:
    """If this fails, `import moshi_mlx` pulls audio devices or a terminal into somebody's application."""
    for name, path in modules("moshi_mlx"):
        for line, target in imports(name, path):
            assert target.split(".")[0] not in PROGRAMS, f"{path}:{line}: {target}"
            assert target.split(".")[0] not in {"sounddevice", "rich"}, f"{path}:{line} imports {target}"


def test_nothing_that_ships_knows_the_training() -> None:
    """If this fails, an installed command ends with an import error: the wheel leaves the training out."""
    for package in ("moshi_mlx", *PROGRAMS):
        for name, path in modules(package):
            for line, target in imports(name, path):
                assert target.split(".")[0] != "moshi_mlx_training", f"{path}:{line} imports {target}"


def test_the_librarys_order() -> None:
    """If this fails, a lower package imports a higher one, or the table allows an import that is not used."""
    seen: dict[str, set[str]] = {name: set() for name in ALLOWED}
    wrong = []
    for name, path in modules("moshi_mlx"):
        here = room(name)
        if here not in ALLOWED:
            continue
        for line, target in imports(name, path):
            there = room(target)
            if there is not None and there != here:
                seen[here].add(there)
                if there not in ALLOWED[here]:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)
    unused = {name: used - seen[name] for name, used in ALLOWED.items() if used - seen[name]}
    assert not unused, f"allowed but not used: {unused}"


def test_every_room_has_its_place() -> None:
    """If this fails, a new module is missing from the order: add it to ALLOWED and to docs/architecture.md."""
    assert {room(name) for name, _ in modules("moshi_mlx")} - {None} - COMMANDS == set(ALLOWED)
    below: set[str] = set()
    for name, used in ALLOWED.items():
        assert used <= below, f"{name} imports what is not below it: {used - below}"
        below.add(name)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    """If this fails, `import moshi_mlx` becomes slow, or fails where an optional package is missing."""
    for name, path in modules("moshi_mlx"):
        for line, target in imports(name, path, at_load=True):
            assert target.split(".")[0] not in HEAVY, f"{path}:{line} imports {target} when it is loaded"


def test_import_is_light() -> None:
    """If this fails, one of the heavy packages is loaded by `import moshi_mlx`, by whatever way."""
    code = f"import sys, moshi_mlx; print(*sorted(set({sorted(HEAVY | {'rich'})}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def in_order(names: list[str]) -> list[str]:
    """Constants, then classes, then functions, each by name: the order that ruff's RUF022 writes."""
    return sorted(set(names), key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_exist(package: str) -> None:
    """If this fails, __all__ names something that is not there, or a reader no longer finds names in order."""
    for name, path in modules(package):
        assigned = [
            ast.literal_eval(node.value)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        if not assigned:
            continue
        (names,) = assigned
        assert names == in_order(names), f"__all__ of {name} should be {in_order(names)}"
        if package == "moshi_mlx_training":
            continue  # needs the train extra
        module = importlib.import_module(name)
        missing = [public for public in names if not hasattr(module, public)]
        assert not missing, f"{name} does not define {missing}"


def test_the_library_says_what_is_public() -> None:
    """If this fails, `from moshi_mlx import *` and the README disagree about the public names."""
    import moshi_mlx

    assert moshi_mlx.__all__ == in_order(moshi_mlx.__all__)
