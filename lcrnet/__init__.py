"""LCR-Net: every person of an image as a full-body 2D pose (pixels) and 3D pose (metres)."""

__version__ = "0.1.0"
