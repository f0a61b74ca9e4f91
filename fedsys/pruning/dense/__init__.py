"""The exact conversion: from a masked model to a smaller dense one that computes the same.

`fedsys.pruning.dense.shrink` is the way in; the plan of what goes, and why, is made before anything
is done (`removal`), and the result is saved as data (`architecture`).
"""
