"""Text from one variant of an artifact, through transformers."""

from __future__ import annotations

from moecc.artifact import Artifact
from moecc.errors import ArtifactError
from moecc.export import load_model
from moecc.manifest import variant_folder


def complete(artifact: Artifact, variant: str, prompt: str, max_new_tokens: int) -> str:
    """The greedy continuation of `prompt`.

    Raises ArtifactError for an unknown variant, or one without a tokenizer.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    artifact.check_variant(variant)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(artifact.path / variant_folder(variant))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"variant `{variant}` has no tokenizer to use: {error}") from None
    model = load_model(artifact, variant, dtype="auto")
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ArtifactError("the prompt has no tokens", "give `--prompt` some text")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    if not model.config.is_encoder_decoder:
        output = output[inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(output, skip_special_tokens=True)
    return text
