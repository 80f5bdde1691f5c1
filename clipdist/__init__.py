"""clipdist: from a general CLIP to the image search of one domain."""

__version__ = "0.1.0"
