"""Floor 0: token shards on disk -> batches of an exactly known order.

    shards/   bytes -> documents           shard_00000.bin + .idx, memory-mapped -> document 1 is tokens 20 21 22 0
    order/    n -> (source, document)      sample 5 -> web's sample 4 -> its tokens 16 to 20 -> documents 1 and 0
    loader    rows -> Batch                samples 4 to 7 -> rank 0 gets 4 and 5, rank 1 gets 6 and 7
    ledger    and back                     step 2 -> samples 4 to 7 -> shards and documents, proved by a hash
    text/     text -> token ids            the tokenizers, for data_tools and generation

docs/data.md follows this sample 5 by hand, number by number. `documents.py` says what the order needs of a source, for
data that is not in shards.

Kept free of imports on purpose: the tokenization workers import `data.shards` and `data.text` and must not pay for
torch. Import from the modules: `from megatron_fp4.data.loader import build_loader`.
"""
