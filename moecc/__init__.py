"""moecc compiles fine-tuned variants of one MoE model into one artifact and serves them all.

`moecc.load(artifact)` serves an artifact from Python; see `moecc.runtime.api`.
"""

from typing import Any

__version__ = "0.1.0"


def load(artifact: Any, **options: Any) -> Any:
    """Loads an artifact; see `moecc.runtime.api.load`, which is imported when it is needed."""
    from moecc.runtime import api

    return api.load(artifact, **options)
