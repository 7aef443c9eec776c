"""moecc compiles fine-tuned variants of one MoE model into one artifact and serves them all."""

__version__ = "0.1.0"
