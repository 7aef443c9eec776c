"""Runs the variants of an artifact, and the models they came from, over whole texts.

The artifact's side is what `serve` computes with: the packed bank, decoded where it is used, and
paged attention where the family has it. The other side is the source under transformers alone.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moecc import evaluation, hub
from moecc.artifact import Artifact
from moecc.checkpoint import TORCH_DTYPES, Checkpoint, Tile, tensor_bytes, transpose
from moecc.errors import MoeccError, RuntimeUnfitError, SourceError
from moecc.evaluation import Sample, Sums
from moecc.files import sha256_file
from moecc.manifest import read_object, variant_file, variant_folder
from moecc.runtime import attention, devices, loading, step
from moecc.runtime.attention import KVCache, Piece, Plan
from moecc.runtime.loading import Progress
from moecc.runtime.residency import Resident
from moecc.skeleton import load_config, model_class
from moecc.sources import Source, resolve
from moecc.texts import load_tokenizer

CONFIG = "config.json"
BLOCK_TOKENS = 16
BATCH = 8
BATCH_LOGITS = 1 << 27  # in one batch at most: half a gigabyte in float32
ROUGE_TOKENS = 64
_PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """
    Attributes:
        texts: variant -> its files.
        window: tokens of a window; encoder-decoders have pairs instead.
        limit: most windows or pairs of a variant; None: all.
        reference: whether to compare with the sources.
        sources: where relative sources start: the recipe's folder.
        rouge: whether to generate, too; of encoder-decoders only.
        device: a torch device's name.
        dtype: what both sides compute in, as `serve` takes it.
    """

    texts: Mapping[str, Sequence[Path]]
    window: int = 256
    limit: int | None = None
    reference: bool = False
    sources: Path = field(default_factory=Path)
    rouge: bool = False
    device: str = "cpu"
    dtype: str = "float32"


def evaluate(
    artifact: Artifact,
    settings: Settings,
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The figures of every variant that has a text: the document of docs/evaluation.md.

    Raises MoeccError for texts, sources and devices that do not do, before weights are loaded.
    """
    for variant in settings.texts:
        artifact.check_variant(variant)
    config = _config(artifact)
    encodes = bool(config.is_encoder_decoder)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not encodes and longest and settings.window > longest:
        raise MoeccError(
            f"a window of {settings.window} tokens is longer than the {longest} the model takes",
            f"give `--window {longest}` or less",
        )
    if settings.rouge:
        if not encodes:
            raise MoeccError("`--rouge` is for encoder-decoders", "leave it out")
        evaluation.check_rouge()
    tokenizers = {variant: _tokenizer(artifact, variant) for variant in settings.texts}
    samples = {
        variant: evaluation.pairs(variant, tokenizers[variant], files, settings.limit)
        if encodes
        else evaluation.windows(
            variant, tokenizers[variant], files, settings.window, settings.limit
        )
        for variant, files in settings.texts.items()
    }
    sources = {v: _source(artifact, v, settings.sources) for v in samples if settings.reference}
    try:
        run = _Run(artifact, settings, samples, sources, tokenizers, on_progress)
        found = {
            variant: run.figures(variant) for variant in artifact.variants if variant in samples
        }
    except torch.OutOfMemoryError as error:
        raise RuntimeUnfitError(
            f"out of memory: {str(error).splitlines()[0]}",
            "use a smaller `--window`, `--dtype bfloat16`, or `--device cpu`",
        ) from None
    dtype = str(run.served.dtype).removeprefix("torch.")
    return evaluation.quality(found, None if encodes else settings.window, dtype)


@dataclass(eq=False)
class _Run:
    """One evaluation; the artifact is loaded once, the references one after the other."""

    artifact: Artifact
    settings: Settings
    samples: Mapping[str, Sequence[Sample]]
    sources: Mapping[str, Source]
    tokenizers: Mapping[str, Any]
    on_progress: Progress
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.settings.device)
        self.served = Served(self.artifact, self.settings.dtype, self.device, self.on_progress)
        self.total = sum(s.nbytes for found in self.samples.values() for s in found)

    def figures(self, variant: str) -> dict[str, Any]:
        """Of one variant, not rounded."""
        found = self._measured(variant)
        gc.collect()  # modules refer to each other, and the next reference needs the memory
        devices.release(self.device, None)
        return found

    def _measured(self, variant: str) -> dict[str, Any]:
        reference = None
        if variant in self.sources:
            reference = load_reference(self.sources[variant], self.served.dtype, self.device)
        sums: list[Sums] = []
        scores: list[float] = []
        others: list[float] = []
        for batch in _batches(self.samples[variant], self.served.vocab):
            sums += self._compared(variant, reference, batch)
            if self.settings.rouge:
                scores += self._rouge(self.served.model(variant), variant, batch)
                others += self._rouge(reference, variant, batch) if reference is not None else []
            self.on_progress("evaluate", self.done, self.total)
        found = evaluation.figures(variant, sums)
        if self.settings.rouge:
            found["rouge"] = evaluation.rouge_figures(scores, others or None)
        return found

    def _compared(self, variant: str, reference: Any, batch: Sequence[Sample]) -> list[Sums]:
        logits = self.served.logits(variant, batch)
        others: Sequence[Tensor | None] = [None] * len(batch)
        if reference is not None:
            others = plain_logits(reference, batch)
        self.done += sum(sample.nbytes for sample in batch)
        return [
            evaluation.compare(sample.labels, ours, theirs)
            for sample, ours, theirs in zip(batch, logits, others, strict=True)
        ]

    def _rouge(self, model: Any, variant: str, batch: Sequence[Sample]) -> list[float]:
        """Of greedy answers of one of the two models."""
        tokenizer = self.tokenizers[variant]
        answers = greedy(model, batch, tokenizer.eos_token_id)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        return evaluation.rouge1(texts, [sample.target for sample in batch])


class Served:
    """The variants of an artifact as the runtime computes them, all on one device.

    Raises RuntimeUnfitError and DamagedArtifactError as `serve` does.
    """

    def __init__(
        self,
        artifact: Artifact,
        dtype: str,
        device: torch.device,
        on_progress: Progress = lambda stage, done, total: None,
    ) -> None:
        artifact.check_sizes()
        self._variants = artifact.variants
        self._device = device
        skeletons = loading.skeletons(artifact, dtype)
        self.dtype = skeletons.dtype
        self.vocab = int(skeletons.models[0].config.get_text_config().vocab_size)
        layers = loading.load_experts(skeletons, device, on_progress)
        shape = (len(artifact.variants), skeletons.layout.nbytes)
        rows = torch.empty(shape, dtype=torch.uint8, device=device)
        loading.load_rows(skeletons, layers, rows, on_progress)
        self._residency = Resident(skeletons, rows)
        refused = attention.refusal(skeletons.models[0]) is not None
        self.is_paged = not refused and self._can_page()
        if not self.is_paged:
            skeletons.use_own_attention()

    def model(self, variant: str) -> Any:
        """The transformers model that computes a variant, over the bank."""
        return self._residency.activate(self._variants.index(variant))

    def logits(self, variant: str, samples: Sequence[Sample]) -> list[Tensor]:
        """Of each sample's labels, `[labels, vocab]`; windows are of one length."""
        if not self.is_paged:
            return plain_logits(self.model(variant), samples)
        tokens = torch.stack([s.tokens for s in samples])
        return list(self._paged(self._variants.index(variant), tokens)[:, :-1].unbind())

    @torch.inference_mode()
    def _paged(self, variant: int, tokens: Tensor) -> Tensor:
        """Logits `[n, length, vocab]` of windows int64 `[n, length]`, in one pass as of prompts."""
        count, length = tokens.shape
        blocks = -(-length // BLOCK_TOKENS)
        pieces = [
            Piece(i * length, (i + 1) * length, 0, range(i * blocks, (i + 1) * blocks))
            for i in range(count)
        ]
        rows = step.Rows((step.Span(variant, 0, tokens.numel()),), self._device)
        wanted = torch.arange(tokens.numel(), device=self._device)
        cache = KVCache(count * blocks, BLOCK_TOKENS)
        with step.running(step.Step(rows, rows, wanted, Plan(pieces, cache, self._device))):
            output = self._residency.activate(variant)(
                input_ids=tokens.to(self._device).view(-1, 1),
                position_ids=torch.arange(length, device=self._device).repeat(count)[:, None],
                use_cache=False,
            )
        found: Tensor = output.logits
        return found.view(count, length, -1)

    def _can_page(self) -> bool:
        """Tries a few tokens, as `serve` does: some families say only then that they cannot."""
        try:
            self._paged(0, torch.arange(_PROBE_TOKENS)[None])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of transformers' modeling code, which meets our functions here
            return False
        return True


def load_reference(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a source as transformers loads it; quantized weights are dequantized first."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    cls = model_class(source.name, source.config)
    config = load_config(source.name, source.config)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # a loss for training
    checkpoint = Checkpoint(source)
    try:
        if checkpoint.quantized:
            state = {name: _whole(checkpoint, name) for name in checkpoint.tensors}
            model = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        else:
            model = cls.from_pretrained(source.file("."), config=config, dtype=dtype)
    finally:
        checkpoint.close()
    return model.eval().to(device)


def _whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """A logical tensor of a checkpoint, on the CPU."""
    found = checkpoint.tensors[name]
    raw = torch.empty(found.nbytes, dtype=torch.uint8)
    whole = raw.view(TORCH_DTYPES[found.dtype]).view(found.shape)
    if found.scales is not None and len(found.shape) == 3:  # MXFP4: experts of [in, out]
        _, rows, cols = found.shape
        for expert, matrix in enumerate(whole):
            tile = Tile(name, 0, cols, rows, expert * rows * cols, 1, cols)
            matrix.copy_(transpose(checkpoint.rows(tile)))
        return whole
    into, done = tensor_bytes(raw), 0
    for block in checkpoint.stream(name):
        into[done : done + len(block)] = block
        done += len(block)
    return whole


@torch.inference_mode()
def plain_logits(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """Of each sample's labels, `[labels, vocab]`, by a model with attention of its own."""
    if samples[0].source is None:
        tokens = torch.stack([s.tokens for s in samples]).to(model.device)
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return list(logits[:, :-1].unbind())
    start = torch.tensor([model.config.decoder_start_token_id])
    written = [torch.cat([start, s.tokens[:-1]]) for s in samples]
    logits = model(
        **_encoded(model, samples),
        decoder_input_ids=pad_sequence(written, batch_first=True).to(model.device),
        use_cache=False,
    ).logits
    return [row[: len(s.tokens)] for row, s in zip(logits, samples, strict=True)]


@torch.inference_mode()
def greedy(model: Any, samples: Sequence[Sample], end: int | None) -> list[list[int]]:
    """What a model writes for each source: at most ROUGE_TOKENS tokens, `end` not included."""
    from transformers import GenerationConfig

    # Its own may sample, and is not loaded with every model.
    model.generation_config = GenerationConfig(
        decoder_start_token_id=model.config.decoder_start_token_id,
        eos_token_id=end,
        pad_token_id=0,
    )
    made = model.generate(**_encoded(model, samples), max_new_tokens=ROUGE_TOKENS, do_sample=False)
    return [_until(row, end) for row in made[:, 1:].tolist()]


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _encoded(model: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What the encoder reads, padded at the end, where `serve` pads."""
    sources = [s.source for s in samples if s.source is not None]
    ids = pad_sequence(sources, batch_first=True)
    mask = pad_sequence([torch.ones_like(s) for s in sources], batch_first=True)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _batches(samples: Sequence[Sample], vocab: int) -> Iterator[Sequence[Sample]]:
    longest = max(len(s.tokens) for s in samples)
    size = min(BATCH, max(1, BATCH_LOGITS // (longest * vocab)))
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _config(artifact: Artifact) -> Any:
    """The base's transformers config; variants agree in what is read of it."""
    return load_config(
        artifact.base, read_object(artifact.path / variant_file(artifact.base, CONFIG))
    )


def _tokenizer(artifact: Artifact, variant: str) -> Any:
    try:
        return load_tokenizer(artifact.path / variant_folder(variant))
    except ValueError as error:
        raise RuntimeUnfitError(
            f"the tokenizer of variant `{variant}` does not load: {error}",
            "variants without a tokenizer cannot be evaluated",
        ) from None


def _source(artifact: Artifact, variant: str, folder: Path) -> Source:
    """The source of a variant, with the very files that the artifact was made from.

    Raises SourceError if it is not found or has changed.
    """
    (entry,) = (v for v in artifact.manifest["variants"] if v["name"] == variant)
    reference = str(entry["source"])
    if entry["commit"]:  # a branch may have moved on
        place = hub.locate(reference, folder)
        if isinstance(place, hub.HubModel):
            reference = f"hf://{place.repo}@{entry['commit']}"
    try:
        source = resolve(variant, reference, folder)
    except SourceError as error:
        hint = "`--sources` names the folder of the recipe, where relative sources start"
        raise SourceError(error.message, "; ".join(filter(None, [error.hint, hint]))) from None
    known = artifact.files.get(variant_file(variant, CONFIG), {})
    same = sha256_file(source.file(CONFIG)) == known.get("sha256")
    if not same or source.content_hashes() != entry["weights"]:
        raise SourceError(
            f"the source `{entry['source']}` of variant `{variant}` is not what the artifact was "
            "made from: its files have other hashes",
            "give the folder of the recipe with `--sources`, or consolidate again",
        )
    return source
