"""Whether a backend computes what it should on the device that is at hand, in seconds.

linear_case   one linear as numbers: a shape, a precision, tensors
operands      quantized operands and products against the `reference` backend, byte by byte
gemms         forward and backward pass against the same products in FP32
trial         both, for every precision of a run, on tensors that are equal on every machine
examine       the trial as a yes or a reason, on a GPU in a process of its own, which a kernel may hang or break

Not here: which backend `precision.backend=auto` then takes (precision/auto.py).
"""
