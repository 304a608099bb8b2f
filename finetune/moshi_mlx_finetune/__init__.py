"""The program ``moshi-mlx-finetune``: recordings in, a low-rank update of a model out."""
