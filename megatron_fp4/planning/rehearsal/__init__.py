"""One real step of one rank of any layout, on an accelerator without memory, in a world without other ranks.

device.py    the accelerator                  world.py      its process groups
on_cuda.py   the configuration                backend.py    how operands are made
build.py     the rank                         step.py       its steps
between.py   evaluation, saves, logged step   sequence.py   do the messages of ranks fit
watch.py     sees every operation             origin.py     where in the project it was asked for
copies.py    between host and device          live.py       memory
messages.py  between ranks                    kernels.py    launches
report.py    all of it beside the plan
"""
