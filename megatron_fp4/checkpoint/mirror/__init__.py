"""Checkpoints in an object store, sent there beside training from the ones on the disk (floor 4).

    PREFIX/latest                                      "step_00000200.3f9ac0de12345678"
    PREFIX/step_00000200.3f9ac0de12345678/             files as in checkpoints/step_00000200, manifest.json last
    PREFIX/lease/00000004.json                         which launch writes here (storage/remote/lease.py)

The number behind the step is the hash of manifest.json, which has the hashes of all other files: a name stands for one
content. So nothing is ever overwritten by other bytes, not by a launch that wakes up after it was replaced, an upload
that was cut off is gone on with, and whoever reads a manifest knows that it is the right one.

    contents.py   what lies there, and in which order a resume tries it
    send.py       one checkpoint to the store
    keep.py       what is removed there, the manifest first
    fetch.py      one checkpoint from the store, by all ranks, checked as it arrives
    worker.py     the thread of rank 0 that does it, again and again until it is done
    state.py      what is said of it: reports, and mirror.json of the run directory
"""
