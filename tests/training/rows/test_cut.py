"""How a batch is cut: each pair once, within the budget, first fit decreasing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_rows import LAYOUTS, pairs_of

from fastdpo.training.rows import PLAIN, Example, Layout
from fastdpo.training.rows.layout import cut


def of_lengths(*lengths: int) -> list[Example]:
    """Pairs of so many tokens in a row that shares their prompt, with nothing else in common."""
    return [Example(torch.arange(n - 2), (torch.tensor([1, 2]), torch.tensor([3, 4]))) for n in lengths]


def test_first_fit_decreasing() -> None:
    """Lengths 3 9 5 4 6 12 2 against a budget of 10: 12 alone | 9 | 6 4 | 5 3 2."""
    pairs = of_lengths(3, 9, 5, 4, 6, 12, 2)
    layout = Layout(sharing=True, packing=True)
    assert [pair.tokens(layout) for pair in pairs] == [3, 9, 5, 4, 6, 12, 2]
    assert cut(pairs, range(7), layout, 10) == [[5], [1], [4, 3], [2, 0, 6]]
    assert cut(pairs, [0, 2, 3], layout, 8) == [[2, 0], [3]]
    assert cut(pairs, range(7), layout, 1) == [[5], [1], [4], [2], [3], [0], [6]]
    # In rows of their own, padded to the longest: 12 | 9 | 6 | 5 4 | 3 2
    assert cut(pairs, range(7), Layout(sharing=True), 10) == [[5], [1], [4], [2, 3], [0, 6]]


IDS = st.lists(st.integers(1, 3), min_size=1, max_size=9).map(torch.tensor)
PAIRS = st.lists(st.builds(Example, IDS, st.tuples(IDS, IDS)), min_size=1, max_size=12)


@given(pairs=PAIRS, budget=st.integers(1, 80), layout=st.sampled_from([PLAIN, *LAYOUTS]))
def test_every_pair_is_cut_once_and_within_the_budget(pairs: list[Example], budget: int, layout: Layout) -> None:
    pairs_batch = pairs_of(*((p.prompt.tolist(), *(ids.tolist() for ids in p.completions)) for p in pairs))
    micros = pairs_batch.cut(budget, None, layout)
    assert sorted(index for micro in micros for index in micro.indices.tolist()) == list(range(len(pairs)))
    for micro in micros:
        assert len(micro) == 1 or micro.input_ids.numel() <= budget
        if len(micro) == 1:
            assert micro.input_ids.numel() == pairs[int(micro.indices)].tokens(layout)
        completions = [pairs[i].completions[side] for side in (0, 1) for i in micro.indices.tolist()]
        assert micro.targets.tolist() == torch.cat(completions).tolist()
        # What is read to predict a token is the token before it, and its position is that of the sequence
        read, place = [], []
        for index, completion in zip(micro.indices.tolist() * 2, completions, strict=True):
            prompt = pairs[index].prompt
            whole = torch.cat([prompt, completion])
            read += whole[len(prompt) - 1 : -1].tolist()
            place += range(len(prompt) - 1, len(whole) - 1)
        assert micro.input_ids.flatten()[micro.score_rows].tolist() == read
        if micro.position_ids is not None:
            assert micro.position_ids.flatten()[micro.score_rows].tolist() == place
