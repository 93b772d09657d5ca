"""Steps in host arrays: rows, spans, wanted logits, and the one page table."""

import numpy as np

from halfbyte.engine.plan.sequence import Sequence, Work
from halfbyte.engine.plan.step import PageTable, lay_out, lay_out_rows
from halfbyte.engine.request import GenerationRequest, SamplingParams


def sequence(
    tokens: list[int], blocks: list[int], slot: int | None, params: SamplingParams | None = None
) -> Sequence:
    request = GenerationRequest("a", tuple(tokens), params or SamplingParams())
    made = Sequence(request, arrival=slot or 0, seed=0, max_tokens=9)
    made.blocks, made.slot = blocks, slot
    return made


def test_the_example_of_the_docstring() -> None:
    decoding = sequence([1, 1, 1, 1, 1], [2, 3], 1)
    decoding.reserve(2)
    works = [Work(sequence([5, 6], [7], 0), 0, 2), Work(decoding, 5, 1)]
    table = PageTable(2, 5, 4)
    step = lay_out(works, table)
    assert step.packed_5T.tolist() == [
        [5, 6, 0],
        [-1, -1, 2],
        [0, 1, 5],
        [28, 29, 13],
        [0, 0, 1],
    ]
    assert step.query_starts_S1.tolist() == [0, 2, 3]
    assert step.context_lengths_S.tolist() == [2, 6]
    assert step.table_rows_S.tolist() == [0, 1]
    assert step.logit_rows_R.tolist() == [1, 2]
    assert table.pages_of(step).tolist() == [[7, 0], [2, 3]]
    assert step.packed_5T.dtype == step.logit_rows_R.dtype == np.int64
    assert table.pages.dtype == step.context_lengths_S.dtype == np.int32
    assert step.query_starts_S1.dtype == np.int32


def test_proposals_are_rows_with_logits() -> None:
    work = Work(sequence([1, 2, 3, 4, 8, 9], [2, 5], 0), 5, 1, (11, 12))
    step = lay_out([work], PageTable(1, 4, 4))
    assert step.packed_5T[0].tolist() == [9, 11, 12]
    assert step.packed_5T[2].tolist() == [5, 6, 7]
    assert step.packed_5T[3].tolist() == [21, 22, 23]
    assert step.logit_rows_R.tolist() == [0, 1, 2] and step.context_lengths_S.tolist() == [8]


def test_unfinished_prompt_has_no_logits_and_prompt_logprobs_need_all() -> None:
    table = PageTable(2, 4, 4)
    part = Work(sequence([1, 2, 3, 4], [0], 0), 0, 2)
    params = SamplingParams(prompt_logprobs=0)
    whole = Work(sequence([1, 2], [1], 1, params), 0, 2)
    assert lay_out([part, whole], table).logit_rows_R.tolist() == [2, 3]
    assert lay_out([part], table).logit_rows_R.tolist() == []


def test_page_table_follows_growth_and_reuse_of_slots() -> None:
    """And the table of a device, told of the changes alone, is the same."""
    table, device = PageTable(3, 5, 16), PageTable(3, 5, 16)

    def update(*sequences: Sequence) -> list[int]:
        rows, changes = table.update([Work(one, 0, 1) for one in sequences])
        device.apply(changes)
        assert (table.pages == device.pages).all()
        return rows

    one, two = sequence([1] * 9, [4, 9], 2), sequence([1] * 9, [3], 0)
    assert update(one, two) == [2, 0]
    assert table.pages[2].tolist() == [4, 9, 0, 0, 0] and table.pages[0].tolist() == [3, 0, 0, 0, 0]
    one.blocks.append(1)
    assert update(one) == [2]
    assert table.pages[2].tolist() == [4, 9, 1, 0, 0]
    _, changes = table.update([Work(one, 0, 1)])
    assert not changes.places_X.size, "written twice"
    assert update(sequence([1] * 9, [8], 2)) == [2] and table.pages[2, 0] == 8
    unscheduled = sequence([1] * 9, [5, 6], None)
    for _ in range(2):
        table.pages[3] = device.pages[3] = 0
        assert update(unscheduled) == [3] and table.pages[3, :2].tolist() == [5, 6]


def test_rows_of_given_tokens_take_their_pages_from_the_table() -> None:
    table = PageTable(2, 4, 4)
    table.update([Work(sequence([1] * 9, [2, 5, 6], 1), 0, 1)])
    step = lay_out_rows([7, 8, 9], [(3, 5), (8, 9)], [1, 1], table, [1])
    assert step.packed_5T.tolist() == [[7, 8, 9], [-1] * 3, [3, 4, 8], [11, 20, 24], [1] * 3]
    assert step.logit_rows_R.tolist() == [1] and not step.changes.places_X.size
