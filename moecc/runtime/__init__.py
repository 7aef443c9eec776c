"""Serves the variants of one artifact: weights on a device, an engine that batches requests."""
