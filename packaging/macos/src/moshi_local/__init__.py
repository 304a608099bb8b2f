"""The program in a bundle."""
