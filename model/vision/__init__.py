"""Image encoders: pixels in, one feature per token out."""

from model.vision.encoder import ImageEncoder, eva_vit, vision_from_folder

__all__ = ["ImageEncoder", "eva_vit", "vision_from_folder"]
