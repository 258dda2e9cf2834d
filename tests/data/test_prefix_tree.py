"""Prefix trees: what is shared, what is not, and that every sequence can be reconstructed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data import prefix_tree
from llava.data.encode import Encoded
from llava.data.prefix_tree import Forest, build_forest, token_identities
from tests.support.trees import encoded, random_sequences


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tokens so expensive that all common prefixes are shared."""
    monkeypatch.setattr(prefix_tree, "TOKEN_COST", 10**9)


def read_back(forest: Forest, sequences: list[Encoded], index: int) -> list[int]:
    ids: list[int] = []
    for node in forest.paths[index]:
        ids += sequences[node.sequences[0]].input_ids[node.start : node.stop]
    return ids


def num_distinct_prefixes(sequences: list[Encoded]) -> int:
    """Return the number of nodes of a trie with one token per node."""
    return len(
        {tuple(values[:length]) for values in token_identities(sequences) for length in range(1, len(values) + 1)}
    )


@given(chance=st.randoms(use_true_random=False), num_sequences=st.integers(1, 12), share=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_a_path(chance: random.Random, num_sequences: int, share: bool) -> None:
    sequences = random_sequences(chance, num_sequences)
    forest = build_forest(sequences, share=share)
    for index, sequence in enumerate(sequences):
        assert read_back(forest, sequences, index) == list(sequence.input_ids)
        path = forest.paths[index]
        assert [node.parent for node in path] == [-1, *(node.index for node in path[:-1])]
        assert [node.start for node in path] == [0, *(node.stop for node in path[:-1])]
    offset = 0
    for number, node in enumerate(forest.nodes):
        assert (node.index, node.offset) == (number, offset) and node.length > 0 and node.parent < number
        offset += node.length
    assert sum(forest.tree_lengths) == offset <= sum(len(sequence.input_ids) for sequence in sequences)
    assert sum(node.parent < 0 for node in forest.nodes) == len(forest.tree_lengths)


@given(chance=st.randoms(use_true_random=False), num_sequences=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_nothing_is_computed_twice(chance: random.Random, num_sequences: int) -> None:
    sequences = random_sequences(chance, num_sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "TOKEN_COST", 10**9)
        assert sum(build_forest(sequences).tree_lengths) == num_distinct_prefixes(sequences)


def test_equal_sequences_are_one_node_with_two_paths() -> None:
    twins = [encoded([5, "a", 6, 7])] * 2
    forest = build_forest(twins)
    assert forest.tree_lengths == (7,) and len(forest.nodes) == 1
    assert forest.nodes[0].sequences == [0, 1] and forest.paths[0] == forest.paths[1]


@pytest.mark.usefixtures("greedy")
def test_other_image_other_tokens() -> None:
    """Placeholders have equal ids, but the tree splits where different images begin."""
    forest = build_forest([encoded([5, "a", 6]), encoded([5, "b", 6]), encoded([5, "a", 7])])
    assert forest.tree_lengths == (1 + 4 + 1 + 1 + 4 + 1,)
    assert [node.parent for node in forest.nodes] == [-1, 0, 1, 1, 0]


@pytest.mark.usefixtures("greedy")
def test_same_text_after_another_image_is_not_shared() -> None:
    forest = build_forest([encoded(["a", 6, "c", 7]), encoded(["b", 6, "c", 7])])
    assert forest.tree_lengths == (10, 10)


def test_labels_never_split_a_node() -> None:
    asked = encoded(["a", 6, 7, 8], trained=[6])
    other = encoded(["a", 6, 7, 8], trained=[5])
    assert len(build_forest([asked, other]).nodes) == 1


@pytest.mark.usefixtures("greedy")
def test_a_sequence_may_end_inside_another() -> None:
    forest = build_forest([encoded([5, 6, 7, 8, 5]), encoded([5, 6]), encoded([5, 6, 7])])
    assert forest.tree_lengths == (5,) and [len(path) for path in forest.paths] == [3, 1, 2]


def test_a_long_opening_is_shared_and_one_token_is_not() -> None:
    """Sharing one token would save one token, but every branch would copy it in every layer."""
    tails = [[6 + index, *range(20, 120)] for index in range(3)]
    assert len(build_forest([encoded([5, *tail]) for tail in tails]).tree_lengths) == 3
    assert len(build_forest([encoded([*range(200, 240), *tail]) for tail in tails]).tree_lengths) == 1


def test_trees_keep_the_order_of_the_sequences() -> None:
    forest = build_forest([encoded([9, 9]), encoded([5, 6]), encoded([7])])
    assert [tree[0].offset for tree in forest.paths] == [0, 2, 4]
