"""FP4 health: which channels of a linear's GEMMs died, and whether quantization killed them.

`probe` watches a step as a backend around another, `weights` measures tiles and block scales, `origins` says which GEMM
made the exact zeros of a weight gradient. Not here: sums over ranks, and where the numbers go
(train/telemetry/monitors/).
"""
