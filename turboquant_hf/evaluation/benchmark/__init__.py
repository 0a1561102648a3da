"""Speed and memory of kernels, encoding, decode steps and whole calls of generate, beside the best 16-bit caches.

- A speed is reported only if the numerical check beside it passed. Otherwise the row has a `reason`.
- Times are medians.
- Rates count the bytes that must be read. They are compared with the bandwidth of a large copy in the same run.
- `ratio_to_fp16` is a time divided by the best uncompressed time (below 1: faster). `speedup` is its inverse.
- The host bounds the eager steps of a model, and its speed changes. Such caches are timed in turns (`turns.py`).
"""
