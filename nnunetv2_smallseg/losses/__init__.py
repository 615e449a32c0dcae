"""Losses in plain PyTorch; nothing here needs nnunetv2."""
