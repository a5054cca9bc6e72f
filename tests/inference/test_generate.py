"""A text is continued token by token, and ends where a document ends."""
