"""Chooses the next token of every row of a batch.

The order is vLLM's: log probabilities are of the raw logits; then come `logit_bias`, the
repetition, frequency and presence penalties, `temperature`, `min_p`, `top_k` and `top_p`.
Tokens that tie with the last one that `top_k` or `top_p` keeps are kept, too.

A row's token depends on nothing but the row: sums, whose order varies with the batch, are of
integers. The draw is the largest sum of logit and Gumbel noise, which is a hash of the sequence's
key and the token: logits that differ in their last bits lead to another token only if the two
largest sums are as near, and not, as inverting the distribution would, near any token's boundary.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from moecc.errors import RequestError
from moecc.runtime.request import Sampling, TokenLogprob

_GREEDY = 1e-5  # temperatures below are greedy, as in vLLM
_WEIGHT = 2.0**40  # of the likeliest token; an int64 holds the sum of 2**22 of them
_NOISE = 2**20  # logits that get their noise at once: 16 MiB of temporaries, which caches hold

# SplitMix64's constants, as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIXES = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class Choice:
    """How one sequence chooses its tokens, and what that needs of its past.

    Attributes:
        key: an int64 that decides the next token. Only `observe` goes on to another, so that a
            step may be done again.
        tokens, counts: those that penalties look at, and how often each was generated.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)
        self.key = self._draw_key()
        self._foreseen: int | None = None
        repeats = sampling.repetition_penalty != 1.0
        self._penalizes = bool(repeats or sampling.frequency_penalty or sampling.presence_penalty)
        self._place = {t: place for place, t in enumerate(dict.fromkeys(prompt if repeats else ()))}
        self.tokens = array("q", self._place)
        self.counts = array("q", bytes(8 * len(self._place)))

    @property
    def is_free(self) -> bool:
        """Whether the next token but one can be chosen without knowing the next."""
        return not self._penalizes and self.sampling.logprobs is None

    def foresee(self) -> int:
        """The key that comes after the next `observe`."""
        if self._foreseen is None:
            self._foreseen = self._draw_key()
        return self._foreseen

    def observe(self, token: int) -> None:
        """Goes on to the next token after this one was chosen."""
        self.key, self._foreseen = self.foresee(), None
        if self._penalizes:
            place = self._place.setdefault(token, len(self.tokens))
            if place == len(self.tokens):
                self.tokens.append(token)
                self.counts.append(0)
            self.counts[place] += 1

    def _draw_key(self) -> int:
        return self._random.getrandbits(64) - 2**63


def check_tokens(sampling: Sampling, vocab: int) -> None:
    """Raises RequestError for a token that is not in a vocabulary of this size."""
    biased = tuple(token for token, _ in sampling.logit_bias)
    for param, tokens in (("logit_bias", biased), ("stop_token_ids", sampling.stop_token_ids)):
        for token in tokens:
            if not 0 <= token < vocab:
                raise RequestError(
                    f"`{param}` has token {token}, but the vocabulary ends at {vocab - 1}",
                    param=param,
                )


class Picked:
    """Tokens that were chosen on the device, int64 [R], and are on their way to the host."""

    def __init__(
        self, tokens: Tensor, finite: Tensor, logits: Tensor, choices: Sequence[Choice]
    ) -> None:
        self.tokens = tokens
        self._logits = logits
        self._choices = choices
        found = torch.stack((tokens, finite))
        self._host, self._arrived = found, None
        if found.is_cuda:
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> list[tuple[int, TokenLogprob | None] | None]:
        """Every row's token, and its log probabilities if asked for; None where there is none.

        Waits for the device.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        chosen, ok = self._host.tolist()
        logprobs = _logprobs(self._logits, self.tokens, self._choices)
        return [
            (token, logprobs.get(row)) if good else None
            for row, (token, good) in enumerate(zip(chosen, ok, strict=True))
        ]


def pick(logits: Tensor, choices: Sequence[Choice], keys: Sequence[int]) -> Picked:
    """Chooses the token of every row of floating [R, vocab]; does not wait for the device.

    All tokens of the choices are in the vocabulary. `keys` are the choices', those of now or those
    foreseen. No token is chosen where logits hold NaN or +inf, or are all -inf.
    """
    if all(_is_plain(choice) for choice in choices):
        tokens = logits.argmax(-1)  # the first of equals
        return Picked(tokens, logits.gather(-1, tokens[:, None])[:, 0].isfinite(), logits, choices)
    values = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _add_bias(values, choices)
    _penalize(values, choices)
    finite = values.amax(-1).isfinite()
    values.masked_fill_(~finite[:, None], 0.0)  # any numbers; they are not used
    tokens = values.argmax(-1)
    drawn = [row for row, choice in enumerate(choices) if choice.sampling.temperature >= _GREEDY]
    if drawn:
        rows = _tensor(drawn, torch.int64, logits)
        tokens[rows] = _draw(
            values[rows], [choices[row] for row in drawn], [keys[row] for row in drawn]
        )
    return Picked(tokens, finite, logits, choices)


def _is_plain(choice: Choice) -> bool:
    """Greedy, by the logits as they are."""
    sampling = choice.sampling
    return sampling.temperature < _GREEDY and not sampling.logit_bias and not choice.tokens


def _tensor(data: object, dtype: torch.dtype, like: Tensor) -> Tensor:
    """`data` on the device of `like`, without waiting for what runs there."""
    return torch.tensor(data, dtype=dtype).to(like.device, non_blocking=True)


def _add_bias(values: Tensor, choices: Sequence[Choice]) -> None:
    """Adds the biases to float32 [R, vocab]; those of one token add up."""
    biases = [
        (row * values.shape[1] + token, bias)
        for row, choice in enumerate(choices)
        for token, bias in choice.sampling.logit_bias
    ]
    if biases:
        index = _tensor([place for place, _ in biases], torch.int64, values)
        added = _tensor([bias for _, bias in biases], torch.float32, values)
        values.view(-1).index_put_((index,), added, accumulate=True)


def _penalize(values: Tensor, choices: Sequence[Choice]) -> None:
    """Applies the penalties to float32 [R, vocab], where a row has any."""
    rows = [(row, choice) for row, choice in enumerate(choices) if choice.tokens]
    if not rows:
        return
    vocab = values.shape[1]
    # `frombuffer` leaves the arrays where they are: thousands of tokens in each, at every step.
    places = [torch.frombuffer(c.tokens, dtype=torch.int64) + row * vocab for row, c in rows]
    index = torch.cat(places).to(values.device, non_blocking=True)
    counts = torch.cat([torch.frombuffer(c.counts, dtype=torch.int64) for _, c in rows])
    counts = counts.to(values.device, non_blocking=True)
    settings = [
        (c.sampling.repetition_penalty, c.sampling.frequency_penalty, c.sampling.presence_penalty)
        for c in choices
    ]
    penalties = _tensor(settings, torch.float64, values)[index // vocab]
    repetition, frequency, presence = penalties.unbind(-1)
    old = values.view(-1)[index].to(torch.float64)
    new = torch.where(old > 0, old / repetition, old * repetition)
    new -= frequency * counts + presence * (counts > 0)
    values.view(-1)[index] = new.to(torch.float32)


def _draw(values: Tensor, choices: Sequence[Choice], keys: Sequence[int]) -> Tensor:
    """A token int64 [S] for each row of finite float32 [S, vocab], which it overwrites."""
    samplings = [choice.sampling for choice in choices]
    vocab = values.shape[1]
    settings = [(s.temperature, s.min_p, s.top_p, min(s.top_k or vocab, vocab)) for s in samplings]
    columns = _tensor(settings, torch.float64, values).T.unsqueeze(-1)
    temperature, min_p, top_p, top_k = columns.unbind()
    # The likeliest becomes 0, so that a small temperature cannot overflow.
    values.sub_(values.amax(-1, keepdim=True)).div_(temperature.to(torch.float32))
    if any(s.min_p for s in samplings):
        values.masked_fill_(values < min_p.log().to(torch.float32), -math.inf)
    cut = [row for row, s in enumerate(samplings) if s.top_p < 1.0 or 0 < s.top_k < vocab]
    if cut:
        rows = _tensor(cut, torch.int64, values)
        part = values[rows]
        values[rows] = part.masked_fill_(part < _least(part, top_k[rows], top_p[rows]), -math.inf)
    _add_noise(values, _tensor([[key] for key in keys], torch.int64, values))
    return values.argmax(-1)  # the first of equals


def _add_noise(values: Tensor, keys: Tensor) -> None:
    """Adds to float32 [S, vocab] standard Gumbel noise, by the keys int64 [S, 1].

    A row's noise depends on nothing but its key, and is at most 37.5 and at least -2.9.
    """
    vocab = values.shape[1]
    rows = max(_NOISE // vocab, 1)
    for part, part_keys in zip(torch.split(values, rows), torch.split(keys, rows), strict=True):
        places = _shifted(_hashes(part_keys, vocab), 11).to(torch.float32)
        # Uniform in (0, 1). Small numbers make the large noise, which wins: so they keep all their
        # digits, and `log1p` does not lose them as the log of a number near 1 would.
        uniform = places.add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
        part.sub_(uniform.neg_().log1p_().neg_().log_())


def _hashes(keys: Tensor, vocab: int) -> Tensor:
    """The first outputs of SplitMix64 for each seed int64 [S, 1]: int64 [S, vocab].

    Products wrap around, on all devices alike.
    """
    mixed = torch.arange(1, vocab + 1, device=keys.device) * _GOLDEN + keys
    for shift, factor in _MIXES:
        mixed.bitwise_xor_(_shifted(mixed, shift)).mul_(factor)
    return mixed.bitwise_xor_(_shifted(mixed, 31))


def _shifted(bits: Tensor, count: int) -> Tensor:
    """int64 shifted right as if it had no sign, which torch would repeat."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _least(values: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least value [S, 1] of [S, vocab] that `top_k` and then `top_p`, both [S, 1], keep."""
    ordered = values.sort(-1, descending=True).values
    last = ordered.gather(-1, top_k.to(torch.int64) - 1)
    weights = _weights(ordered.masked_fill(ordered < last, -math.inf))
    mass = weights.cumsum(-1)
    kept = (mass - weights < top_p * mass[:, -1:]).sum(-1, keepdim=True)
    return ordered.gather(-1, kept - 1)


def _weights(values: Tensor) -> Tensor:
    """Integers proportional to the probabilities of [S, vocab], whose maximum is 0."""
    return values.exp().mul_(_WEIGHT).to(torch.int64)


def _logprobs(logits: Tensor, tokens: Tensor, choices: Sequence[Choice]) -> dict[int, TokenLogprob]:
    """What is to be reported of each row that asks for it."""
    asked = {
        row: choice.sampling.logprobs
        for row, choice in enumerate(choices)
        if choice.sampling.logprobs is not None
    }
    if not asked:
        return {}
    rows = _tensor(list(asked), torch.int64, logits)
    logprobs = logits[rows].log_softmax(-1, dtype=torch.float32)
    vocab = logits.shape[1]
    # `topk` orders equal values at will, so its keys hold the token below the bits of the value,
    # which are in the order of the values: none is negative.
    keys = logprobs.abs().view(torch.int32).to(torch.int64) << 32
    keys += torch.arange(vocab, device=logits.device)
    best = keys.topk(min(max(asked.values()), vocab), largest=False).values & 0xFFFFFFFF
    answers = torch.cat((tokens[rows, None], best), -1)
    answers_logprobs = logprobs.gather(-1, answers)
    found = {}
    for (row, count), ids, likely in zip(
        asked.items(), answers.tolist(), answers_logprobs.tolist(), strict=True
    ):
        top = tuple(zip(ids[1 : count + 1], likely[1 : count + 1], strict=True))
        found[row] = TokenLogprob(ids[0], likely[0], top)
    return found
