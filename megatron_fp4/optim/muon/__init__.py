"""Muon: a matrix is updated by the nearest orthogonal matrix of its momentum, which takes the whole matrix.

    config          what a user sets
    choice          which parameters it updates, and why the others stay with AdamW
    newton_schulz   the orthogonalization of one matrix
    exchange        matrices travel from the pieces of the ranks to one owner each, and back
    update          one step

Masters and momentum stay divided like AdamW's (layout.py): by flat ranges, as rectangles of logical tensors. So sums,
checkpoints and the refresh of parameters know nothing of Muon, memory is even, and what depends on a whole matrix is
computed by one rank of the pipeline stage, in one order and one precision: no layout changes a bit of it.
"""
