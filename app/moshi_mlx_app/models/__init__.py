"""The published models, the one to take here, its download, and the speed of this machine."""
