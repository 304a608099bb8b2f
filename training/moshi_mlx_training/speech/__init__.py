"""Sentences, and the synthesizers and recogniser that speak and hear them."""
