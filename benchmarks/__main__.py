"""All benchmarks, or those that are named: ``python -m benchmarks`` in the repository's root.

    python -m benchmarks                 all of them, one after the other
    python -m benchmarks mimi small      these
    python -m benchmarks mimi -- --frames 50
    python -m benchmarks --list

Each benchmark is a module of this package with a function ``main(argv)``. It prints a table for people first and one
line of JSON last. One that fails is reported at the end and does not stop the others; Ctrl-C ends the run.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

__all__ = ["available", "main"]


def available(folder: Path = FOLDER) -> dict[str, str]:
    """Names of the benchmarks in ``folder`` and the first sentence of what each says of itself; nothing is imported."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            text = (ast.get_docstring(tree) or "").split("\n\n")[0]
            found[path.stem] = " ".join(text.split()).split(": ``")[0].rstrip(".")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks; 0 if all of them went through, 1 if one failed, 130 after Ctrl-C."""
    known = available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and cost, measured here. Each prints a table, then one line of JSON.",
        epilog="Options after -- are passed to the benchmark, of which there must be only one.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    argv = list(sys.argv[1:] if argv is None else argv)
    rest: list[str] = []
    if "--" in argv:
        rest, argv = argv[argv.index("--") + 1 :], argv[: argv.index("--")]
    args = parser.parse_args(argv)
    if args.list:
        for name, text in known.items():
            print(f"{name:16} {text}")
        return 0
    names = args.names or list(known)
    for name in names:
        if name not in known:
            parser.error(f"there is no benchmark {name}; there are {', '.join(known)}")
    if rest and len(names) != 1:
        parser.error("options after -- are for one benchmark: name it")
    failed = []
    for name in names:
        began = time.monotonic()
        print(f"== {name}: {known[name]}", flush=True)
        try:
            code = importlib.import_module(f"benchmarks.{name}").main(rest)
        except KeyboardInterrupt:
            print(f"\n{name} was interrupted", file=sys.stderr)
            return 130
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
            code = 1
        if code:
            failed.append(name)
        print(f"== {name}: {'failed' if code else 'done'} after {time.monotonic() - began:.0f} s\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
