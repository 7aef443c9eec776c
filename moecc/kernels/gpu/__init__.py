"""The Triton kernels themselves, imported only where they run."""
