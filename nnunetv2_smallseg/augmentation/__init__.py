"""Data augmentation on top of nnU-Net's."""
