"""Which rectangles of logical tensors a checkpoint holds, which rank wrote each, and where its bytes lie.

Arrays, not objects: at thousands of ranks a checkpoint has a million rectangles. layout.py is the table and its file,
plan.py makes it from what the ranks hold, metadata.py reads the description that older checkpoints have instead,
stored.py is either of them, and read.py fills tensors from the files.
"""
