"""megatron_fp4: Megatron-style pretraining of language models in NVFP4 (arXiv 2509.25149).

The package is built in floors; imports point down only (see docs/architecture.md):
settings, storage -> numerics, data -> comm -> precision -> layers, pipeline, optim, checkpoint -> models -> train ->
proofs, planning, interop -> cli, pretrain.
"""

__version__ = "0.1.0"
