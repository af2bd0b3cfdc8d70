"""Geometric augmentation that does not leak into samples: the network is told its parameters (Karras et al. 2022, F.2)."""

AUGMENT_PARAMETERS = 9
"""Numbers that describe the augmentation of one image."""
