"""Optimizer state between two steps, in fewer bytes than FP32.

    config      what a user sets
    remainder   an FP32 master as its BF16 weight and 17 bits more
    codes       numbers in 8 bits, a power of two for each block of 64
    stores      one tensor of a rank's part of a bucket: what is kept, and FP32 values of any stretch of it
    noise       the random words of rounding, by the place of an element in its logical tensor
    part        all state of a rank's part of a bucket; chunks of it are FP32 while they are updated
    adamw       AdamW over parts

An update works on FP32 values whatever is kept, and a checkpoint holds FP32 values, which every format reads; whoever
stores what he has read stores the same bits. Rounding and blocks depend on the place in the logical tensor only, so
that no layout changes a bit. Not here: what travels between ranks (grad_buffer.py, param_buffer.py).
"""
