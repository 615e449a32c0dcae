"""Networks and trainers for small-lesion segmentation, as a plugin of unmodified nnU-Net v2."""

__version__ = "0.1.0"
