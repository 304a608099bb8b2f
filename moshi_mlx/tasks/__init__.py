"""Uses of a model, one file each."""
