"""Settings that every test shares."""

from __future__ import annotations

import os

from moshi_mlx.cpu.backend import VARIABLE, choose_backend

# No test may reach a hub: where one tries, it fails at once and says so, instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# What computes is said here, so that no command spends a second on measuring it.
os.environ.setdefault(VARIABLE, choose_backend())
