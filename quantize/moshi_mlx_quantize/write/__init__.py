"""The smaller checkpoint, on disk."""
