"""Layers of the models: parallel linears, embedding, norm, attention, MLP, Mamba-2, loss (floor 3)."""
