import torch
from torch import Tensor

from halfbyte.engine.batch import BlockTable, lay_out
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.scheduler import Work
from halfbyte.engine.sequence import Sequence
from halfbyte.model.tiny import tiny_config

TEXT = tiny_config(layers=1).text


def sequence(
    tokens: list[int], blocks: list[int], slot: int, params: SamplingParams | None = None
) -> Sequence:
    request = GenerationRequest("a", tuple(tokens), params or SamplingParams())
    made = Sequence(request, arrival=slot, seed=0, max_tokens=9)
    made.blocks, made.slot = blocks, slot
    return made


def cache() -> PagedCache:
    return PagedCache(TEXT, format="fp8", num_pages=9, block_tokens=4, kv_scales=[(1.0, 1.0)])


def as_list(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


def test_the_example_of_the_docstring() -> None:
    prefill = Work(sequence([5, 6, 7], [7], 0), 0, 3)
    decode = Work(sequence([1, 2, 3, 4, 8, 9], [2, 5], 1), 5, 1)
    works = [prefill, decode]
    batch = lay_out(works, BlockTable(2, 4).rows(works), cache())
    assert as_list(batch.token_ids_T) == [5, 6, 7, 9]
    assert as_list(batch.positions_T) == [0, 1, 2, 5]
    assert as_list(batch.attend.slots_T) == [28, 29, 30, 21]
    assert batch.attend.block_table_SP.tolist() == [[7, 0], [2, 5]]
    assert as_list(batch.attend.context_lengths_S) == [3, 6]
    assert as_list(batch.attend.query_starts_S1) == [0, 3, 4]
    assert as_list(batch.logit_rows_R) == [2, 3]
    assert batch.attend.block_table_SP.dtype == torch.int32
    assert batch.attend.slots_T.dtype == torch.int64


def test_unfinished_prompt_has_no_logits_and_prompt_logprobs_need_all() -> None:
    part = Work(sequence([1, 2, 3, 4], [0], 0), 0, 2)
    params = SamplingParams(prompt_logprobs=0)
    whole = Work(sequence([1, 2], [1], 1, params), 0, 2)
    works = [part, whole]
    batch = lay_out(works, BlockTable(2, 4).rows(works), cache())
    assert as_list(batch.logit_rows_R) == [2, 3]
    alone = lay_out([whole], BlockTable(2, 4).rows([whole]), cache())
    assert alone.logit_rows_R is None
    nothing = lay_out([part], BlockTable(2, 4).rows([part]), cache())
    assert as_list(nothing.logit_rows_R) == []


def test_row_of_a_slot_follows_its_sequence() -> None:
    table = BlockTable(2, 4)
    first = sequence([1] * 5, [3, 4], 1)
    assert table.rows([Work(first, 4, 1)]).tolist() == [[3, 4]]
    first.blocks.append(8)
    assert table.rows([Work(first, 4, 1)]).tolist() == [[3, 4, 8]]
    second = sequence([1], [6], 1)
    assert table.rows([Work(second, 0, 1)]).tolist() == [[6]]
