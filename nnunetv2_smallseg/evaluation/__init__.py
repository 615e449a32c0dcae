"""Evaluation made for small lesions: voxels, surfaces, lesions, sizes, and the official protocols of challenges.

Imports neither torch nor nnunetv2. Every metric is defined in ``docs/evaluation.md``.
"""
