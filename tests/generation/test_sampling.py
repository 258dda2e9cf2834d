"""Sampled tokens: their distribution, the filters, and independence of other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.generation import sampling
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


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (0.99, 4)])
def test_a_share_that_is_reached_exactly_needs_no_further_token(top_p: float, num_kept: int) -> None:
    rows = torch.tensor([0.0, 0.0, 0.0, 0.0]).expand(400, -1)  # four shares of exactly a quarter
    assert set(choose_tokens(rows, [draw(0, top_p=top_p)] * 400)) == set(range(num_kept))


class HighestNumber(TokenDraw):
    """Draw of 1, as rounding may make the largest number below it."""

    def number(self) -> float:
        return 1.0


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_highest_number_draws_a_token_that_is_possible(options: dict) -> None:
    rows = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    rows[:, 40:] = -torch.inf
    highest = HighestNumber(Sampling(seed=0, temperature=1.0, **options))
    assert all(token < 40 for token in choose_tokens(rows, [highest] * 200))


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


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=3)])
def test_some_ids_are_never_chosen(sampling: Sampling) -> None:
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = 30.0
    draws = [TokenDraw(sampling, index) for index in range(64)]
    assert set(choose_tokens(logits, draws)) == {4}
    chosen = choose_tokens(logits, draws, never=(4, 99))
    assert 4 not in chosen and len(set(chosen)) > 2
    assert logits[:, 4].eq(30.0).all()


def test_logprobs_may_be_those_of_the_distribution_that_is_sampled_from() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    found = logprobs_of(logits, [1, 2, 3], [0, 2], temperatures=[0.5, 2.0], never=(4,))
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    wanted = [(logits[0, kept] / 0.5).log_softmax(-1)[1], (logits[2, kept] / 2.0).log_softmax(-1)[3]]
    assert found == pytest.approx([float(value) for value in wanted], abs=1e-6)


@pytest.mark.parametrize("levels", [7, 1000])
def test_only_the_likeliest_are_sorted_as_all_are(levels: int) -> None:
    """With few levels the smallest value that is kept has ties, which are decided by index."""
    torch.manual_seed(levels)
    values = torch.randint(0, levels, (3, 50)).float()
    found = sampling._sorted(values, [4, 9, 2])
    expected = values.sort(dim=-1, descending=True, stable=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[:, :9], theirs[:, :9])
