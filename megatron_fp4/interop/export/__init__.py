"""A checkpoint as a folder of other people's files: `transformers`, compressed-tensors, ModelOpt.

    plan.py        which tensor of transformers holds which logical tensors, and the operand that its codes are of
    phase.py       in the precision of which step codes are made
    calibrate.py   scales of activations, where servers quantize these too
    weights.py     rows of masters -> rows of the files' tensors, a piece at a time
    parts.py       safetensors files of bounded size, written in place
    quantized.py   what the two 4-bit formats call their tensors, and their sections of config.json
    text.py        the tokenizer as `tokenizer.json`, proved equal to ours; ids of bos, eos and pad
    card.py        README.md: data, tokens, loss, precision table
    folder.py      all of it into a new folder, complete or absent

Nothing of theirs is imported: the formats are written from their descriptions, and the tests read them with the
libraries.
"""
