"""The program ``moshi-mlx-quantize``: a bf16 checkpoint in, a smaller one out, and what that cost."""
