"""Recordings with timed words, as the tokens that a model learns from."""
