"""Does a claim hold? Arms of an experiment that differ in a setting, paired by seed, and what gaps they have (floor 7).

    design.py     a study as a value: arms, seeds, measure, registered claims
    intervals.py  the gap of an arm in percent with an interval, and the smallest gap the design could have seen
    measures.py   what is compared of a run: its loss over a window, over the whole run, on a held-out set
    outcome.py    the gaps of all arms and the verdict on every claim

A pair is two runs with one seed: the same initial weights, the same batches, the same addressed noise. Their difference
is small where the difference of two seeds is large, so pairs are what is averaged. Not here: starting runs and reading
YAML (cli/study/).
"""
