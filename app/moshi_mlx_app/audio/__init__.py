"""Microphone and loudspeaker: devices, rates, echo."""
