"""The program ``moshi-mlx-local``: devices, terminal and web page around the library ``moshi_mlx``."""
