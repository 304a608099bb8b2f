"""Train, evaluate and export the codec."""
