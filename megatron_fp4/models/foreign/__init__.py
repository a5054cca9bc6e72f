"""Models of other libraries: their settings and the names of their tensors, against ours.

Below the trainer, because a run may begin from their files (`train.init_from`). Not here: writing files for others
(interop/).
"""
