"""Recordings in, recordings and transcripts out, and the files that a command writes."""
