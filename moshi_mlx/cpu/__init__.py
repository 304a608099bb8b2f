"""The same two networks in numpy, one frame at a time: for a CPU."""
