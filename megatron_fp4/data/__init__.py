"""Floor 0: token shards on disk -> batches of an exactly known order.

Kept free of imports on purpose: the tokenization workers import `data.shard` and `data.tokenizer` and must not pay
for torch. Import from the modules: `from megatron_fp4.data.loader import build_loader`.
"""
