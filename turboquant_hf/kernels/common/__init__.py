"""What Triton kernels of several operations share: descriptions of codes, addresses, means, unpacking."""
