"""What moecc computes with on a GPU: Triton kernels, each beside its plain-torch reference."""
