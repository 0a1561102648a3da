"""Speed and memory: kernels, encoding, decode steps and whole calls of generate beside the fairest 16-bit rivals.

A speed is reported only where the numerical check beside it passed; otherwise the row has a `reason`. Times are
medians, rates count the bytes that must be read, and the bandwidth that they are held against is that of a large copy
on the same device in the same run. `ratio_to_fp16` is a time over the best uncompressed time (below 1: faster),
`speedup` its inverse. For eager steps of a model, which the host bounds, the steps are taken in turns (`turns.py`).
"""
