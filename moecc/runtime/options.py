"""How an artifact is served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moecc.errors import RuntimeUnfitError

Mode = Literal["auto", "mixed", "resident", "swap"]
Policy = Literal["fifo", "grouped"]


@dataclass(frozen=True, slots=True)
class Options:
    """
    Attributes:
        gpu: number of the GPU; None is the CPU.
        mode: where the non-expert weights are (residency.py); `auto` takes the first of mixed,
            resident and swap that the family and the free memory allow.
        dtype: what is computed in, as `from_pretrained` takes it.
        policy: how variants take turns where a batch is of one variant (scheduler.py).
        max_num_seqs: most requests that run at once.
        max_model_len: most tokens of a prompt and its answer; None: as the models have it.
        max_batch_tokens: most tokens of one forward pass; longer prompts are read in chunks.
        max_waiting: most requests that wait; one more is refused.
        kv_cache_bytes: memory for keys and values; None: on a GPU what is free below
            `gpu_memory_utilization`, on the CPU a quarter of what is free, but no more than
            `max_num_seqs` requests of `max_model_len` tokens can use.
        gpu_memory_utilization: the part of a GPU's memory that may be used.
        verify: hash every file of the artifact before it is served.
    """

    gpu: int | None = None
    mode: Mode = "auto"
    dtype: str = "auto"
    policy: Policy = "grouped"
    max_num_seqs: int = 64
    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    verify: bool = False

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("policy", get_args(Policy))):
            if getattr(self, name) not in known:
                raise RuntimeUnfitError(
                    f"`{name}` is one of {', '.join(known)}, not `{getattr(self, name)}`"
                )
        for name in ("max_num_seqs", "max_batch_tokens", "max_waiting", "max_model_len"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise RuntimeUnfitError(f"`{name}` must be a whole number, at least 1")
        if self.gpu is not None and not isinstance(self.gpu, int):
            raise RuntimeUnfitError("`gpu` is the number of one")
