"""The console: `megatron-fp4 COMMAND`. Only this floor and pretrain.py import hydra and omegaconf (floor 8)."""
