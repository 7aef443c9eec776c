"""The OpenAI-compatible HTTP server over the engine of `moecc.runtime`."""
