"""Transformer Engine's own vocabulary: recipes, versions, its reference quantizer."""
