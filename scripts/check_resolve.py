"""Does every dependency have a wheel, on each platform and Python that the project names?

pip's dry run resolves for a foreign platform, but reads environment markers for the Python that runs it. So the markers
are read here, for the target: those of this project's own requirements before pip is asked, those of everything found
after it has answered. What a target needs and pip left out is added and asked for again, until nothing is missing.

    python scripts/check_resolve.py            # every target
    python scripts/check_resolve.py --python 3.14 --platform macos --verbose

Asks the package index, downloads metadata only, takes a minute or two. Exit status 1 where a target does not resolve.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


@dataclass(frozen=True)
class Platform:
    """A kind of machine: the oldest system that must work, as wheel tags, newest first, and its markers."""

    name: str
    tags: tuple[str, ...]
    markers: dict[str, str]

    def environment(self, python: str) -> dict[str, str]:
        """What environment markers are read against."""
        return {
            **self.markers,
            "os_name": "posix",
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }


PLATFORMS = [
    Platform(
        "macos 14 arm64",
        tuple(
            f"macosx_{version}_{kind}"
            for version in ("14_0", "13_0", "12_0", "11_0")
            for kind in ("arm64", "universal2")
        )
        + ("macosx_10_9_universal2", "macosx_10_6_universal2"),
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    ),
    Platform(
        "linux x86_64",
        tuple(f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)) + ("manylinux2014_x86_64", "linux_x86_64"),
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    ),
]


def applies(requirement: Requirement, environment: dict[str, str], extras: set[str]) -> bool:
    """Whether a target needs this requirement of a package that was asked for with ``extras``."""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**environment, "extra": extra}) for extra in (extras or {""}))


def own_requirements(environment: dict[str, str], extras: tuple[str, ...]) -> list[str]:
    """This project's requirements for a target, without markers."""
    project = read_project()
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    wanted = [requirement for requirement in map(Requirement, lines) if applies(requirement, environment, set())]
    for requirement in wanted:
        requirement.marker = None
    return [str(requirement) for requirement in wanted]


def read_project() -> dict:
    """The [project] table. Python 3.10 has no tomllib, but pip has."""
    try:
        import tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def ask_pip(platform: Platform, python: str, wanted: list[str]) -> list[dict]:
    """pip's report on what it would install. Raises RuntimeError with its complaint."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--dry-run"]
    command += ["--ignore-installed", "--only-binary", ":all:", "--target", "unused", "--report", "-"]
    command += ["--implementation", "cp", "--python-version", python]
    for tag in platform.tags:
        command += ["--platform", tag]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError("; ".join(errors) or done.stderr.strip()[-400:])
    return json.loads(done.stdout)["install"]


def resolve(platform: Platform, python: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Name -> version of everything that a target would install. Raises RuntimeError where a wheel is missing."""
    environment = platform.environment(python)
    wanted = own_requirements(environment, extras)
    while True:
        found, needed = {}, []
        for item in ask_pip(platform, python, wanted):
            found[canonicalize_name(item["metadata"]["name"])] = item["metadata"]["version"]
            asked = set(item.get("requested_extras", []))
            for requirement in map(Requirement, item["metadata"].get("requires_dist", [])):
                if applies(requirement, environment, asked):
                    requirement.marker = None
                    needed.append(requirement)
        missing = sorted({str(r) for r in needed if canonicalize_name(r.name) not in found})
        if not missing:
            return found
        wanted += missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", choices=PYTHONS, action="append", help="only this Python")
    parser.add_argument("--platform", help="only platforms whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="print everything that would be installed")
    arguments = parser.parse_args()

    shown = [
        "mlx",
        "mlx-lm",
        "numpy",
        "rustymimi",
        "sentencepiece",
        "huggingface-hub",
        "soundfile",
        "soxr",
        "sounddevice",
    ]
    rows, failed = [["platform", "Python", "extras", "packages", *shown]], 0
    for platform in PLATFORMS:
        if arguments.platform and arguments.platform not in platform.name:
            continue
        choices: list[tuple[str, ...]] = [(), ("dev",)]
        if platform.markers["sys_platform"] == "linux":
            choices.append(("cuda",))
        for python in arguments.python or PYTHONS:
            for extras in choices:
                found, complaint = {}, ""
                try:
                    found = resolve(platform, python, extras)
                except RuntimeError as error:
                    complaint = str(error)
                row = [platform.name, python, ",".join(extras) or "-", str(len(found)) if found else "FAILS"]
                rows.append(row + [found.get(name, "-") for name in shown])
                print(
                    f"{platform.name}, Python {python}, extras {row[2]}: {complaint or f'{len(found)} packages'}",
                    flush=True,
                )
                failed += bool(complaint)
                if arguments.verbose:
                    print("  " + ", ".join(f"{name} {version}" for name, version in sorted(found.items())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
