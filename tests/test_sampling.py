"""moecc.runtime.sampling: against a plain float64 reference, by hand, and whatever the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecc.errors import RequestError
from moecc.runtime import sampling as module
from moecc.runtime.request import Sampling
from moecc.runtime.sampling import Choice, _add_noise, _hashes, check_tokens

INF = math.inf
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WRAP = 2**64
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def past(sampling: Sampling, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> Choice:
    choice = Choice(sampling, prompt)
    for token in generated:
        choice.observe(token)
    return choice


def choose(logits: Tensor, choices: Sequence[Choice]) -> list[Any]:
    """Every row's token and log probabilities; None where there is none."""
    return module.pick(logits, choices, [choice.key for choice in choices]).result()


def tokens(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    return [token for token, _ in choose(logits, choices)]


def pick(logits: Sequence[float], choice: Choice, key: int | None = None) -> int:
    """The token of one row, for a given key."""
    if key is not None:
        choice.key = key
    return tokens(torch.tensor([logits]), [choice])[0]


def hashed(key: int, token: int) -> int:
    """SplitMix64, with Python's integers."""
    z = (key + (token + 1) * GOLDEN) % WRAP
    z = (z ^ z >> 30) * FIRST % WRAP
    z = (z ^ z >> 27) * SECOND % WRAP
    return z ^ z >> 31


def key_of(hash_: int, token: int) -> int:
    """The key with which a token has this hash."""

    def unshifted(x: int, count: int) -> int:
        z = x
        for _ in range(64 // count):
            z = x ^ z >> count
        return z

    z = unshifted(hash_, 31) * pow(SECOND, -1, WRAP) % WRAP
    z = unshifted(z, 27) * pow(FIRST, -1, WRAP) % WRAP
    z = (unshifted(z, 30) - (token + 1) * GOLDEN) % WRAP
    return z - WRAP if z >= WRAP // 2 else z


def favor(token: int) -> int:
    """The key that gives a token the most noise there is, 37.4."""
    return key_of(0, token)


def hinder(token: int) -> int:
    """The key that gives a token the least noise there is, -2.8."""
    return key_of(WRAP - 1, token)


def gumbel(key: int, token: int) -> float:
    """A token's noise: -log(-log(1 - v)), of v that is rounded as a float32 is."""
    v = float(np.float32(((hashed(key, token) >> 11) + 0.5) * 2.0**-53))
    return -math.log(-math.log1p(-min(v, 1 - 2**-24)))


def keys_of(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.getrandbits(64) - 2**63 for _ in range(count)]


def noise(keys: Sequence[int], vocab: int, device: str = "cpu") -> Tensor:
    values = torch.zeros(len(keys), vocab, device=device)
    _add_noise(values, torch.tensor(keys, device=device)[:, None])
    return values


def support(logits: Sequence[float], sampling: Sampling) -> set[int]:
    """The tokens that can be chosen, of logits less than 30 apart."""
    choices = [Choice(sampling, ()) for _ in logits]
    for token, choice in enumerate(choices):
        choice.key = favor(token)
    return set(tokens(torch.tensor(logits).expand(len(logits), -1), choices))


def distribution(
    logits: Sequence[float], s: Sampling, prompt: Sequence[int], generated: Sequence[int]
) -> np.ndarray:
    """What a token is chosen from, float64 [vocab], a step at a time."""
    x = np.array(logits, dtype=np.float64)
    for token, bias in s.logit_bias:
        x[token] += bias
    for token in {*prompt, *generated}:
        x[token] *= 1 / s.repetition_penalty if x[token] > 0 else s.repetition_penalty
    for token, count in Counter(generated).items():
        x[token] -= s.frequency_penalty * count + s.presence_penalty
    x /= s.temperature
    p = softmax(x)
    x[p < s.min_p * p.max()] = -INF
    if s.top_k:
        x[x < sorted(x)[-s.top_k :][0]] = -INF
    if s.top_p < 1.0:
        p = softmax(x)
        likelier = np.array([p[p > value].sum() for value in p])
        assume((abs(likelier - s.top_p) > 1e-6).all())
        x[likelier >= s.top_p] = -INF
    return softmax(x)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 1.5, 100.0]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    top_k=st.one_of(st.just(0), st.integers(1, 50)),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.2, 1.0]),
    presence_penalty=st.sampled_from([0.0, -1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.6]),
    logit_bias=st.sampled_from([(), ((3, 2.5), (0, -100.0), (3, 1.0))]),
)
TOKENS = st.lists(st.integers(0, 36), max_size=6)
KEYS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(0, 36).map(favor), st.integers(0, 36).map(hinder)
)


@settings(max_examples=300, deadline=None)
@given(SAMPLINGS, TOKENS, TOKENS, KEYS, st.integers(0, 999), st.booleans())
def test_reference(
    sampling: Sampling,
    prompt: list[int],
    generated: list[int],
    key: int,
    seed: int,
    coarse: bool,
) -> None:
    logits = torch.randn(37, generator=torch.Generator().manual_seed(seed)) * 4
    if coarse:  # ties
        logits = logits.round()
    p = distribution(logits.tolist(), sampling, prompt, generated)
    token = pick(logits.tolist(), past(sampling, prompt, generated), key)
    with np.errstate(divide="ignore"):
        scores = np.log(p) + [gumbel(key, token) for token in range(37)]
    assert scores[token] > scores.max() - 1e-3
    assert p[token] > 0


def test_tokens_of_seeds() -> None:
    logits = torch.randn(400, 60, generator=torch.Generator().manual_seed(0)) * 3
    choice = Choice(Sampling(seed=9, temperature=0.7), ())
    for row, key in zip(logits.tolist(), keys_of(9, 400), strict=True):
        scores = [value / 0.7 + gumbel(key, token) for token, value in enumerate(row)]
        token = pick(row, choice)
        assert token == scores.index(max(scores))
        assert pick(row, choice) == token  # until it is observed
        choice.observe(token)


def test_hashes() -> None:
    # What Vigna's splitmix64.c gives first for the seeds 0 and 1234567.
    known = [
        (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
        (6457827717110365317, 3203168211198807973, 9817491932198370423),
    ]
    found = _hashes(torch.tensor([[0], [1234567]]), 3)
    assert [[value % WRAP for value in row] for row in found.tolist()] == [list(k) for k in known]
    keys = [0, -1, -(2**63), 2**63 - 1, favor(7), hinder(7)]
    found = _hashes(torch.tensor(keys)[:, None], 200)
    for key, row in zip(keys, found.tolist(), strict=True):
        assert [value % WRAP for value in row] == [hashed(key, token) for token in range(200)]
    assert found[4:, 7].tolist() == [0, -1]


def test_noise() -> None:
    keys = keys_of(3, 10)
    found = noise(keys, 500)
    expected = [[gumbel(key, token) for token in range(500)] for key in keys]
    assert torch.allclose(found.double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    assert scipy.stats.kstest(found.flatten(), "gumbel_r").pvalue > 0.01


@pytest.mark.parametrize("place", [0, 1, 2, 3, 1000, 2**24 - 1, 2**30 + 1, 2**40 + 12345])
def test_noise_at_the_ends(place: int) -> None:
    small, large = key_of(place << 11, 3), key_of(WRAP - 1 - (place << 11), 3)
    found = noise([small, large], 5)[:, 3].tolist()
    exact = -math.log(-math.log1p(-(place + 0.5) * 2.0**-53))
    assert found[0] == pytest.approx(exact, rel=3e-7)  # no two likely places are one
    assert found[1] == pytest.approx(gumbel(large, 3), rel=3e-7)
    assert -2.82 < found[1] < found[0] < 37.5


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 1003, 4099])
def test_noise_does_not_depend_on_the_batch(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(vocab, 60)
    alone = torch.cat([noise([key], vocab) for key in keys])
    assert torch.equal(noise(keys, vocab), alone)
    assert torch.equal(noise(keys[::-3], vocab), alone.flip(0)[::3])
    for count in (1, vocab, 7 * vocab + 1, 59 * vocab, 60 * vocab):
        monkeypatch.setattr("moecc.runtime.sampling._NOISE", count)
        assert torch.equal(noise(keys, vocab), alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_devices() -> None:
    keys = keys_of(0, 50)
    seeds = torch.tensor([*keys, favor(5), hinder(5)])[:, None]
    assert torch.equal(_hashes(seeds.cuda(), 3000).cpu(), _hashes(seeds, 3000))
    assert torch.allclose(noise(keys, 3000, "cuda").cpu(), noise(keys, 3000), rtol=1e-6, atol=1e-6)
    logits, choices = mixed(200, 1003, seed=8)
    assert tokens(logits.cuda(), choices) == tokens(logits, choices)


def zipf(vocab: int) -> Tensor:
    """Logits of a language: the n-th likeliest token is n times rarer than the likeliest."""
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(vocab))
    return 15 - (order + 1.0).log()


def test_rounding_seldom_leads_to_another_token() -> None:
    logits, generator = zipf(3000), torch.Generator().manual_seed(1)
    choices = [Choice(Sampling(seed=seed), ()) for seed in range(200)]
    flips = {1e-6: 0, 1e-2: 0}
    for step in range(102):
        expected = tokens(logits.expand(200, -1), choices)
        # That large errors do lead to other tokens shows that errors matter at all.
        for size in (1e-6, 1e-2) if step < 5 else (1e-6,):
            errors = 1 + size * torch.randn(200, 3000, generator=generator)
            found = tokens(logits * errors, choices)
            flips[size] += sum(a != b for a, b in zip(found, expected, strict=True))
        for choice, token in zip(choices, expected, strict=True):
            choice.observe(token)
    assert flips[1e-6] < 20400 / 20000
    assert flips[1e-2] > 10


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4, 5]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4, 5]),
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_p=0.8), [1, 3, 4]),
        (Sampling(min_p=0.3), [1, 3, 4]),
        (Sampling(temperature=2.0, min_p=0.4), [0, 1, 3, 4]),  # temperature first
        (Sampling(top_k=4, top_p=0.85), [1, 3, 4]),  # top_p is of what top_k left
        (Sampling(min_p=0.1, top_k=5, top_p=0.9), [0, 1, 3, 4]),
    ],
)
def test_frequencies(sampling: Sampling, kept: list[int]) -> None:
    p = np.array([0.09, 0.4, 0.04, 0.3, 0.15, 0.02])
    expected = p[kept] ** (1 / sampling.temperature)
    expected /= expected.sum()
    choices = [Choice(replace(sampling, seed=seed), ()) for seed in range(20)]
    logits = torch.tensor(p).log().float().expand(20, 6)
    found: Counter[int] = Counter()
    for _ in range(150):
        step = tokens(logits, choices)
        found.update(step)
        for choice, token in zip(choices, step, strict=True):
            choice.observe(token)
    assert set(found) == set(kept)
    counts = [found[token] for token in kept]
    assert scipy.stats.chisquare(counts, expected * 3000).pvalue > 0.01


def test_first_tokens_of_seeds_are_spread() -> None:
    p = np.array([0.5, 0.2, 0.3])
    choices = [Choice(Sampling(seed=seed), ()) for seed in range(3000)]
    found = Counter(tokens(torch.tensor(p).log().expand(3000, 3), choices))
    counts = [found[token] for token in range(3)]
    assert scipy.stats.chisquare(counts, p * 3000).pvalue > 0.01


def test_frequencies_of_a_large_vocabulary() -> None:
    logits = zipf(500)
    choices = [Choice(Sampling(seed=seed), ()) for seed in range(20000)]
    found = np.bincount(tokens(logits.expand(20000, -1), choices), minlength=500)
    p = softmax(logits.double().numpy())
    assert scipy.stats.chisquare(found, p * 20000).pvalue > 0.01


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 9e-6])
def test_greedy(temperature: float) -> None:
    choice = Choice(Sampling(temperature=temperature, top_k=2, top_p=0.5, min_p=0.1), ())
    assert pick([0.5, 2.0, -1.0, 2.0], choice, favor(3)) == 1  # the first of equals
    assert pick([-INF, -5.0, -INF], choice, favor(0)) == 1
    assert pick([1.0, 1.0 + 2**-23], choice) == 1
    assert tokens(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16), [choice]) == [1]


def test_top_k_of_one_is_greedy() -> None:
    logits = torch.randn(50, 333, generator=torch.Generator().manual_seed(0))
    top = [Choice(Sampling(top_k=1, temperature=temperature), ()) for temperature in [0.02, 5] * 25]
    assert tokens(logits, top) == logits.argmax(-1).tolist()


def test_ties_with_the_last_one_are_kept() -> None:
    logits = [1.0, 0.0, 1.0, 2.0, 1.0]
    assert support(logits, Sampling(top_k=1)) == {3}
    assert support(logits, Sampling(top_k=2)) == {0, 2, 3, 4}
    assert support(logits, Sampling(top_k=5)) == support(logits, Sampling(top_k=10**9))
    assert support(logits, Sampling(top_p=0.6)) == {0, 2, 3, 4}
    assert support(logits, Sampling(top_p=0.4)) == {3}
    assert support(logits, Sampling(top_p=5e-324)) == {3}
    assert support([0.0] * 4, Sampling(top_p=0.5)) == {0, 1, 2, 3}


@pytest.mark.parametrize("key", [favor(0), favor(2), hinder(1), hinder(2), 0, -1])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 1e-9}])
def test_impossible_tokens_are_never_chosen(key: int, more: dict[str, float]) -> None:
    choice = Choice(Sampling(**more), ())  # type: ignore[arg-type]
    assert pick([-INF, -INF, 1.0, -INF], choice, key) == 2
    assert pick([-200.0, 5.0, -300.0], choice, key) == 1
    assert pick([-3e38, -3e38, 3e38], choice, key) == 2
    assert pick([-3e38, -INF, -INF], choice, key) == 0
    assert pick([1.0], choice, key) == pick([-3e38], choice, key) == 0


def test_ends_of_the_distribution() -> None:
    choice = Choice(Sampling(), ())
    assert pick([0.0] * 1000, choice, favor(0)) == 0
    assert pick([0.0] * 1000, choice, favor(999)) == 999
    assert pick([0.0, -30.0], choice, favor(1)) == 1  # a ten-trillionth, but there
    assert pick([0.0, -41.0], choice, favor(1)) == 0
    assert pick([0.0, 0.0], choice, hinder(0)) == 1
    assert pick([5.0, -45.0], choice, hinder(0)) == 0
    for count in (16383, 16384, 16385, 30000):
        assert pick([0.0] * count + [-20.0, -INF], choice, favor(count)) == count
        assert pick([0.0] * count + [-20.0, -INF], choice, favor(count + 1)) < count


@pytest.mark.parametrize("temperature", [1e-5, 1e-3])
def test_small_temperatures(temperature: float) -> None:
    choice = Choice(Sampling(temperature=temperature), ())
    assert pick([1e30, 3e38, -3e38, 5.0], choice, favor(0)) == 1
    assert pick([7.0, 7.0], choice, favor(0)) == 0
    assert pick([7.0, 7.0], choice, favor(1)) == 1


@pytest.mark.parametrize(
    ("sampling", "prompt", "generated", "logits", "token"),
    [
        # Positive logits are divided: 2 / 1.3 > 1.5 > 2 / 1.4.
        (Sampling(repetition_penalty=1.3), [0], [], [2.0, 1.5], 0),
        (Sampling(repetition_penalty=1.4), [0], [], [2.0, 1.5], 1),
        (Sampling(repetition_penalty=1.4), [], [0], [2.0, 1.5], 1),
        (Sampling(repetition_penalty=1.3), [0, 0, 0], [0, 0], [2.0, 1.5], 0),  # once
        # Others are multiplied.
        (Sampling(repetition_penalty=1.4), [0], [], [-1.0, -1.5], 0),
        (Sampling(repetition_penalty=1.6), [0], [], [-1.0, -1.5], 1),
        (Sampling(repetition_penalty=0.6), [1], [], [-1.0, -1.5], 1),
        (Sampling(repetition_penalty=1.6), [0], [0], [-INF, -9.0], 1),
        # Once for what was generated, however often; the prompt does not count.
        (Sampling(presence_penalty=0.9), [], [0, 0, 0], [3.0, 2.0], 0),
        (Sampling(presence_penalty=1.1), [], [0], [3.0, 2.0], 1),
        (Sampling(presence_penalty=1.1), [0, 0], [], [3.0, 2.0], 0),
        (Sampling(presence_penalty=-1.1), [], [1], [3.0, 2.0], 1),
        # As often as generated.
        (Sampling(frequency_penalty=0.6), [0, 0], [0], [3.0, 2.0], 0),
        (Sampling(frequency_penalty=0.6), [], [0, 1, 0, 0], [3.0, 2.0], 1),
        # Bias, repetition, the others: (1 + 5) / 2 - 1 = 2.
        (
            Sampling(repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((0, 5.0),)),
            [],
            [0],
            [1.0, 2.1],
            1,
        ),
        (
            Sampling(repetition_penalty=2.0, frequency_penalty=1.0, logit_bias=((0, 5.0),)),
            [],
            [0],
            [1.0, 1.9],
            0,
        ),
        (Sampling(logit_bias=((1, 1.5),)), [], [], [2.0, 1.0], 1),
        (Sampling(logit_bias=((1, 0.5), (1, 0.4))), [], [], [2.0, 1.0], 0),
        (Sampling(logit_bias=((1, 0.5), (1, 0.6))), [], [], [2.0, 1.0], 1),
    ],
)
def test_penalties(
    sampling: Sampling, prompt: list[int], generated: list[int], logits: list[float], token: int
) -> None:
    choice = past(replace(sampling, temperature=0.0), prompt, generated)
    other = past(GREEDY, prompt, generated)
    rows = torch.tensor([[2.0, 1.0], logits, [1.0, 2.0]])
    assert tokens(rows, [other, choice, other]) == [0, token, 1]


def test_only_tokens_that_matter_are_kept() -> None:
    assert not past(Sampling(logit_bias=((1, 2.0),)), (1, 2), (3,)).tokens
    assert list(past(Sampling(presence_penalty=1.0), (1, 2), (3, 3)).tokens) == [3]
    choice = past(Sampling(repetition_penalty=2.0), (1, 2, 1), (3, 2))
    assert (list(choice.tokens), list(choice.counts)) == ([1, 2, 3], [0, 1, 1])


def mixed(count: int, vocab: int, seed: int) -> tuple[Tensor, list[Choice]]:
    """Rows of every kind, with a past."""
    draw = random.Random(seed)
    choices = []
    for _ in range(count):
        sampling = Sampling(
            temperature=draw.choice([0.0, 0.2, 1.0, 3.0]),
            top_p=draw.choice([1.0, 1.0, 0.9, 0.3]),
            top_k=draw.choice([0, 0, 1, 40, 5000]),
            min_p=draw.choice([0.0, 0.0, 0.05]),
            presence_penalty=draw.choice([0.0, 0.0, 1.0]),
            frequency_penalty=draw.choice([0.0, 0.0, -0.5]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            logit_bias=draw.choice([(), ((draw.randrange(vocab), 5.0),)]),
            seed=draw.randrange(10**9),
            logprobs=draw.choice([None, None, 0, 3, 20]),
        )
        ids = [draw.randrange(vocab) for _ in range(draw.randrange(60))]
        choices.append(past(sampling, ids[20:], ids[:20]))
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return logits, choices


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(1003, torch.float32), (1003, torch.bfloat16), (16, torch.float16)]
)
def test_rows_do_not_depend_on_the_batch(vocab: int, dtype: torch.dtype) -> None:
    logits, choices = mixed(64, vocab, seed=1)
    logits = logits.to(dtype)
    alone = [choose(logits[row : row + 1], [choices[row]])[0] for row in range(64)]
    assert len({token for token, _ in alone}) > 10
    assert choose(logits, choices) == alone  # nothing changed either
    draw = random.Random(2)
    for _ in range(60):
        rows = draw.sample(range(64), draw.randrange(1, 64))
        assert choose(logits[rows], [choices[row] for row in rows]) == [alone[row] for row in rows]


def generate(sampling: Sampling, count: int = 20, company: int = 0) -> list[int]:
    """Tokens of one sequence, with so many others in the batch."""
    choice = Choice(sampling, (1, 2))
    answer: list[int] = []
    for step in range(count):
        logits, others = mixed(company, 50, seed=step)
        row = torch.randn(1, 50, generator=torch.Generator().manual_seed(step))
        answer.append(tokens(torch.cat((logits, row)), [*others, choice])[-1])
        choice.observe(answer[-1])
    return answer


def test_seeds() -> None:
    seeded = generate(Sampling(seed=5))
    assert generate(Sampling(seed=5), company=7) == seeded
    assert generate(Sampling(seed=6)) != seeded
    assert generate(Sampling()) != generate(Sampling())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 301, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    exact = logits.double().log_softmax(-1).tolist()
    asked = [20, None, 0, 3]
    changed = Sampling(temperature=0.5, logit_bias=((7, 50.0),), repetition_penalty=1.5, top_k=9)
    choices = [Choice(replace(changed, logprobs=count), (1, 2, 3)) for count in asked]
    for row, (token, found) in enumerate(choose(logits, choices)):
        assert token == 7
        count = asked[row]
        if count is None:
            assert found is None
            continue
        assert found is not None
        assert found.token == token
        assert found.logprob == pytest.approx(exact[row][token], abs=1e-5)
        best = sorted(range(301), key=lambda i: (-exact[row][i], i))[:count]
        assert [i for i, _ in found.top] == best
        assert [p for _, p in found.top] == pytest.approx([exact[row][i] for i in best], abs=1e-5)


def test_logprobs_of_ties_are_in_the_order_of_tokens() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 200], logits[0, 4] = 1.0, -INF
    [(token, found)] = choose(logits, [Choice(Sampling(temperature=0.0, logprobs=5), ())])
    assert token == 200
    assert found is not None
    assert [i for i, _ in found.top] == [200, 0, 1, 2, 3]
    [(_, found)] = choose(logits[:, :6], [Choice(Sampling(temperature=0.0, logprobs=9), ())])
    assert found is not None
    assert [i for i, _ in found.top] == [0, 1, 2, 3, 5, 4]
    assert found.top[-1][1] == -INF
    logits[0, 5] = 200.0  # its log probability is 0
    [(_, found)] = choose(logits, [Choice(Sampling(temperature=0.0, logprobs=2), ())])
    assert found is not None
    assert found.top == ((5, 0.0), (200, -199.0))


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [0.0, INF, 1.0], [-INF, -INF, -INF]])
def test_unusable_logits(bad: list[float]) -> None:
    greedy = Choice(Sampling(temperature=0.0, logprobs=2), ())
    drawn = Choice(Sampling(seed=1, top_k=2, top_p=0.9, min_p=0.1), ())
    good = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.5, 1.0]])
    expected = tokens(good, [greedy, drawn])
    rows = torch.cat((torch.tensor([bad]), good, torch.tensor([bad])))
    first, *others, last = choose(rows, [drawn, greedy, drawn, greedy])
    assert first is last is None
    assert [token for token, _ in others] == expected
    assert tokens(good, [greedy, drawn]) == expected  # no random number was used up


def test_overflow_by_a_penalty_is_unusable() -> None:
    choice = Choice(Sampling(repetition_penalty=1e-300), (0,))
    assert choose(torch.tensor([[1.0, 0.0]]), [choice]) == [None]


def test_logits_stay_as_they_are() -> None:
    logits, choices = mixed(20, 33, seed=4)
    padded = torch.cat((logits, torch.full((20, 7), INF)), -1)
    kept = padded.clone()
    assert choose(padded[:, :33], choices) == choose(logits, choices)
    assert choose(logits.T.contiguous().T, choices) == choose(logits, choices)
    assert torch.equal(padded, kept)


def test_no_rows() -> None:
    assert choose(torch.empty(0, 5), []) == []


def test_sorts_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(3, 5)
    sort, sorted_rows = Tensor.sort, []

    def spy(self: Tensor, *args: int, **options: bool) -> object:
        sorted_rows.append(len(self))
        return sort(self, *args, **options)

    monkeypatch.setattr(Tensor, "sort", spy)
    plain = Choice(Sampling(min_p=0.1), ())
    tokens(logits, [plain, Choice(Sampling(temperature=0.0, top_p=0.5), ()), plain])
    assert sorted_rows == []
    tokens(logits, [plain, Choice(Sampling(top_p=0.5), ()), plain])
    assert sorted_rows == [1]


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(logit_bias=((9, 1.0), (10, 1.0))), "logit_bias"),
        (Sampling(logit_bias=((-1, 1.0),)), "logit_bias"),
        (Sampling(stop_token_ids=(10,)), "stop_token_ids"),
        (Sampling(stop_token_ids=(3, -1)), "stop_token_ids"),
    ],
)
def test_tokens_outside_the_vocabulary(sampling: Sampling, param: str) -> None:
    with pytest.raises(RequestError, match=f"`{param}` .* ends at 9") as caught:
        check_tokens(sampling, 10)
    assert caught.value.param == param
    check_tokens(Sampling(logit_bias=((9, 1.0), (0, 1.0)), stop_token_ids=(0, 9)), 10)
