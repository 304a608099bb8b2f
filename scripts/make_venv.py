"""Make a virtual environment and install into it: ``python3 scripts/make_venv.py .venv REQUIREMENT...``.

Called by the Makefile with whatever ``python3`` the machine has, so this file keeps to syntax that an old
Python can read: it must be able to say that the Python is too old.
"""

import os
import subprocess
import sys

OLDEST = (3, 10)
# What the machine may have under another name when its python3 is too old.
NAMES = ["python3.%d" % minor for minor in (13, 12, 11, 10, 14)]


def version_of(command):
    """(major, minor) of an interpreter, or None where it does not run."""
    try:
        said = subprocess.check_output(
            [command, "-c", "import sys; print(sys.version_info[0], sys.version_info[1])"],
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = said.split()
    return int(major), int(minor)


def choose():
    """This interpreter where it is new enough, else the first newer one found on the PATH."""
    if sys.version_info[:2] >= OLDEST:
        return sys.executable
    for name in NAMES:
        found = version_of(name)
        if found is not None and found >= OLDEST:
            return name
    sys.exit(
        "This project needs Python %d.%d or newer and found only %s.\n"
        "Install one (python.org, Homebrew, your distribution) and run: make PYTHON=/path/to/python3.12 ..."
        % (OLDEST + (sys.version.split()[0],))
    )


def main(folder, arguments):
    inside = os.path.join(folder, "bin", "python")
    if version_of(inside) is None:
        made = subprocess.call([choose(), "-m", "venv", "--clear", folder])
        if made != 0:
            # Debian ships Python without ensurepip; virtualenv brings its own pip.
            made = subprocess.call([choose(), "-m", "virtualenv", "--quiet", "--clear", folder])
        if made != 0:
            sys.exit(
                "Could not make a virtual environment in %s.\n"
                "On Debian and Ubuntu: apt-get install python3-venv. Elsewhere: pip install virtualenv." % folder
            )
    print("installing %s into %s (the first time takes a few minutes)" % (" ".join(arguments), folder), flush=True)
    # Twice quiet: errors are shown, the names of a hundred packages are not.
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]
    return subprocess.call([*pip, "install", *arguments])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
