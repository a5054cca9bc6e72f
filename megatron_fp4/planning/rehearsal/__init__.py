"""One real step of one rank of any layout, on an accelerator without memory, in a world without other ranks.

device.py     the accelerator          world.py     its process groups       stand_ins.py   what only CUDA has
watch.py      sees every operation     origin.py    where it was asked for
copies.py     host and device          live.py      memory                   kernels.py     launches
messages.py   between ranks            sequence.py  their order on ranks     step.py        the step itself
"""
