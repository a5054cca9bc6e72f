"""Floor 1: Triton kernels, and the only room that imports triton. NVFP4 on any GPU with the bits of a CPU.

quantize     the quantizers as functions of tensors     multiply   the product of two packed operands
values       how a copy is coded, what a device can do, the packed operand; options of every launch
layout       how scales lie in memory

Device code, from the small to the large:
arithmetic   what decides bits: scales, codes, noise, one function each
hadamard     a block as a tuple of registers, and the random Hadamard transform across them
measure      max |x|, of a tensor and of its transform in one reading; the words of the noise
rows         the quantizer of a copy that is contracted along its rows: the fast and simple case
lanes        the quantizer of every other copy: transposed, transformed, in 16x16 tiles, four over six
gemm         codes x codes, by FP4 tensor cores or decoded in registers

Not here: what a recipe wants (precision/backends/triton.py). Importing this package imports no triton.
"""
