"""Norms and cross-entropy of Transformer Engine and Apex, behind one function each; chains that torch compiles."""
