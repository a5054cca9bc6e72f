"""What QK-clip needs of an attention: the largest logits of its heads (maxima.py), factors of its rows (factors.py)."""
