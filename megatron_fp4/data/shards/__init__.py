"""Shards on disk: bytes -> documents of token ids. Free of torch, for the workers that tokenize."""
