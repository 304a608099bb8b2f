"""Settings that every test shares."""

from __future__ import annotations

import os

# No test may reach a hub: where one tries, it fails at once and says so, instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
