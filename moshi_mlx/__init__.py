"""Moshi on MLX."""
