"""Text to token ids and back. Free of torch, for the workers that tokenize."""
