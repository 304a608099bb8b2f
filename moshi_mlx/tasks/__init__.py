"""What a model can do, a file each."""
