"""Sampled tokens: their distribution, the filters, and independence of other rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.generation.protocol import Sampling
from llava.generation.sampling import TokenDraw, choose_tokens, logprobs_of

VOCABULARY = 11
LOGITS = torch.linspace(-2.0, 2.0, VOCABULARY).flip(0)[
    torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
]


def draw(seed: int, **options: float) -> TokenDraw:
    return TokenDraw(Sampling(seed=seed, **{"temperature": 1.0, **options}))  # type: ignore[arg-type]


def frequencies(num: int = 20_000, **options: float) -> torch.Tensor:
    one = draw(0, **options)
    tokens = choose_tokens(LOGITS.expand(num, -1), [one] * num)
    return torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / num


def test_token_frequencies_are_the_probabilities() -> None:
    assert torch.allclose(frequencies(), LOGITS.softmax(0), atol=0.015)
    assert torch.allclose(frequencies(temperature=0.5), (LOGITS / 0.5).softmax(0), atol=0.015)


def test_top_k_keeps_the_likeliest() -> None:
    expected = LOGITS.softmax(0)
    expected[expected < expected.sort(descending=True).values[2]] = 0
    assert torch.allclose(frequencies(top_k=3), expected / expected.sum(), atol=0.015)


def test_top_p_keeps_the_fewest_that_reach_the_share() -> None:
    probabilities, order = LOGITS.softmax(0).sort(descending=True)
    kept = probabilities.cumsum(0) - probabilities < 0.7
    expected = torch.zeros(VOCABULARY).scatter(0, order, torch.where(kept, probabilities, 0.0))
    assert 1 < kept.sum() < VOCABULARY
    assert torch.allclose(frequencies(top_p=0.7), expected / expected.sum(), atol=0.015)
    assert torch.equal(frequencies(100, top_p=1e-6), torch.nn.functional.one_hot(LOGITS.argmax(), VOCABULARY).float())


ROWS = st.lists(
    st.tuples(
        st.integers(0, 5), st.sampled_from([0.0, 0.6, 1.0]), st.sampled_from([1.0, 0.8]), st.sampled_from([0, 4])
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_a_row_does_not_depend_on_other_rows(rows: list[tuple[int, float, float, int]]) -> None:
    def draws() -> list[TokenDraw]:
        return [draw(seed, temperature=t, top_p=p, top_k=k) for seed, t, p, k in rows]

    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(len(rows)))
    together, alone = draws(), draws()
    for _ in range(3):
        expected = [choose_tokens(logits[i : i + 1], [one])[0] for i, one in enumerate(alone)]
        assert choose_tokens(logits, together) == expected
    for i, (_, temperature, _, _) in enumerate(rows):
        if temperature == 0.0:
            assert expected[i] == logits[i].argmax()


def test_streams_of_seeds_and_samples_differ() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    firsts = {TokenDraw(sampling, index).number() for index in range(20)}
    assert len(firsts) == 20
    assert TokenDraw(sampling, 1).number() != TokenDraw(Sampling(temperature=1.0, seed=4), 0).number()
    assert TokenDraw(sampling, 1).number() == TokenDraw(sampling, 1).number()


def test_logprobs_ignore_temperature_and_half_precision_sums_in_float() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = logits.float().log_softmax(-1)[[0, 1, 2], [5, 6, 7]]
    assert torch.allclose(torch.tensor(logprobs_of(logits, [5, 6, 7])), expected, atol=1e-5)


def test_the_likeliest_token_is_the_first_of_equals_in_every_precision() -> None:
    greedy = TokenDraw(Sampling())
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [float("-inf"), -2.0, -5.0, -2.0]])
    for precision in (torch.float32, torch.bfloat16, torch.float64):
        assert choose_tokens(logits.to(precision), [greedy, greedy]) == [1, 1]
    assert choose_tokens(logits[:, ::2], [greedy, greedy]) == [1, 1]
