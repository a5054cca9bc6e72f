"""`megatron-fp4 health`: does quantization make exact zeros in a trained model's weight gradients, and what helps?

`patient` computes a gradient of a checkpoint in any precision, `remedies` are what may help, `rules` say it as the
product's configuration does, `examine` tries them on one batch.
"""
