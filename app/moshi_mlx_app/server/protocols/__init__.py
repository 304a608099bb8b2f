"""The protocols that clients speak, a file each."""
