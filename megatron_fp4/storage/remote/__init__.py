"""Object stores (S3, Google Cloud, Azure, and a folder or memory that behave like one) behind a few calls (floor 0).

    url.py      which URLs are taken, and why another one is refused
    client.py   put, create, replace, read, list, delete; what a store answers, as a few kinds of error
    lease.py    one owner at a time, by puts of new objects

obstore (the extra `store`) is imported by client.py alone, when a store is opened. Not here: what checkpoints are in a
store (checkpoint/mirror/).
"""
