"""Pretrained weights: entries, the weights folder, reading checkpoints, loading them into networks."""
