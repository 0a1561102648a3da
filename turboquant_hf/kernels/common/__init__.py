"""What Triton kernels of several operations share: what they are told about codes, addresses, means, unpacking."""
