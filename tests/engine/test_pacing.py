"""What steps beside answers carry: filled to sizes that the answers' gaps allow."""

import itertools
import statistics

import pytest

from halfbyte.engine.plan.pacing import (
    Demand,
    FreePacer,
    GapPacer,
    LinePacer,
    SlicePacer,
    StepCosts,
)

# Milliseconds of 88 layers on one H200 (benchmarks/records/mixed-steps-h200.json), rounded.
H200_MS = {
    1: 21.5, 2: 22.0, 4: 22.5, 8: 23.0, 16: 25.5, 24: 27.0, 32: 29.0, 48: 32.0, 64: 36.0,
    96: 46.0, 128: 50.0, 256: 89.0, 384: 149.0, 512: 167.0, 640: 225.0, 768: 250.0, 1024: 325.0,
    2048: 668.0,
}  # fmt: skip
SIZES = tuple(H200_MS)
# Seconds for a row of a chunk and a token of its context: graphs read a context for every row.
DEEP_S = {128: 40e-9, 2048: 6.6e-9}


class Machine:
    """A device whose steps cost what the table says, `slower` times, plus the answers' contexts."""

    def __init__(self, slower: float = 1.0, answers_s: float = 0.0) -> None:
        self.slower = slower
        self.answers_s = answers_s

    def seconds(self, num_rows: int, row_tokens: float = 0.0) -> float:
        size = next(size for size in SIZES if size >= num_rows)
        deep_s = DEEP_S[128 if size <= 128 else 2048]
        return H200_MS[size] / 1e3 * self.slower + self.answers_s + deep_s * row_tokens


def measured(machine: Machine) -> StepCosts:
    known = {size: machine.seconds(size) - machine.answers_s for size in SIZES}
    return StepCosts(SIZES, known, DEEP_S)


def read_prompt(
    pacer: GapPacer, machine: Machine, num_answers: int, num_tokens: int, num_prompts: int = 1
) -> tuple[list[float], float]:
    """Gaps of the answers while a prompt is read, and prompt tokens a second."""
    gaps, done = [], 0
    while done < num_tokens:
        count = pacer.prompt_tokens(Demand(num_answers, num_tokens - done, done, num_prompts))
        assert count is not None and 0 < count <= num_tokens - done
        row_tokens = count * (done + count / 2)
        seconds = machine.seconds(num_answers + count, row_tokens)
        pacer.observe(seconds, num_answers, count, row_tokens)
        gaps.append(seconds)
        done += count
    return gaps, num_tokens / sum(gaps)


def test_a_step_is_filled_to_a_size_and_no_row_further() -> None:
    pacer = GapPacer(0.15, measured(Machine()))
    assert pacer.prompt_tokens(Demand(8, 32000)) == 248
    assert pacer.prompt_tokens(Demand(64, 32000)) == 192
    # Others wait behind it: a gap three tenths longer buys a rate a third higher.
    assert pacer.prompt_tokens(Demand(64, 32000, num_prompts=2)) == 448
    # 200 tokens would need the next size; 192 and 8 are quicker than 200.
    assert pacer.prompt_tokens(Demand(64, 200)) == 192
    assert pacer.prompt_tokens(Demand(64, 8)) == 8


def test_one_long_prompt_beside_eight_answers() -> None:
    """32k tokens within 20 s while no answer waits longer than 160 ms for a token."""
    gaps, rate = read_prompt(GapPacer(0.15, measured(Machine())), Machine(), 8, 32000)
    assert 32000 / rate < 20.0
    assert max(gaps) < 0.16


def test_a_queue_of_prompts_beside_64_answers() -> None:
    """Steps within 200 ms read prompts at eight times the rate of 300 answers' tokens a second."""
    pacer = GapPacer(0.15, measured(Machine()))
    for _ in range(20):
        gaps, rate = read_prompt(pacer, Machine(), 64, 1024, num_prompts=9)
        assert max(gaps) < 0.2
    assert rate > 2300


@pytest.mark.parametrize("slower", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("answers_s", [0.0, 0.02])
def test_a_table_that_is_wrong_is_refined(slower: float, answers_s: float) -> None:
    """A colder or slower device than when it was measured, and contexts that nobody foresaw."""
    pacer, machine = GapPacer(0.15, measured(Machine())), Machine(slower, answers_s)
    for _ in range(20):
        pacer.observe(machine.seconds(16), 16, 0)
    gaps: list[float] = []
    for _ in range(10):
        gaps, _ = read_prompt(pacer, machine, 16, 8000)
    least = machine.seconds(32)
    assert statistics.quantiles(gaps, n=10)[-1] < max(0.16, 1.2 * least)


@pytest.mark.parametrize("target_s", [0.03, 0.06, 0.1, 0.2, 0.5, 1.0])
def test_gaps_keep_their_target_where_any_step_does(target_s: float) -> None:
    pacer, machine = GapPacer(target_s, measured(Machine())), Machine()
    for num_answers in (1, 8, 17, 64, 100):
        gaps, _ = read_prompt(pacer, machine, num_answers, 20000)
        least = machine.seconds(num_answers + 1) + DEEP_S[128] * 32 * 20000
        assert max(gaps) <= max(target_s * 1.02, 1.05 * least)


def test_longer_gaps_never_read_prompts_slower() -> None:
    rates = []
    for target_s in (0.03, 0.06, 0.1, 0.2, 0.5, 1.0):
        rates.append(read_prompt(GapPacer(target_s, measured(Machine())), Machine(), 16, 20000)[1])
    # Of steps that are nearly as good, the shorter ones are taken.
    assert all(later > 0.85 * before for before, later in itertools.pairwise(rates))
    assert rates[-1] > 2 * rates[0]


@pytest.mark.parametrize(
    ("decode_s", "token_s"), [(0.012, 0.0005), (0.050, 0.0015), (0.025, 0.0003), (0.002, 2e-5)]
)
@pytest.mark.parametrize("target_s", [None, 0.1, 0.3])
def test_a_device_without_sizes_is_learnt(
    decode_s: float, token_s: float, target_s: float | None
) -> None:
    """Never measured ahead: steps come near to the target and not beyond, whatever came first."""
    wanted_s = 2 * decode_s if target_s is None else target_s
    for ahead in (0, 20):
        pacer, gaps = LinePacer(target_s), []
        for _ in range(ahead):
            pacer.observe(decode_s, 4, 0)
        for _ in range(120):
            count = pacer.prompt_tokens(Demand(4, 10**6))
            assert count is not None
            gaps.append(decode_s + count * token_s)
            pacer.observe(gaps[-1], 4, count)
        late = sorted(gaps[60:])
        assert 0.7 * wanted_s < late[len(late) // 2] and late[-1] <= wanted_s
        # One step in seventeen carries no prompt.
        assert 2 <= late.count(decode_s) <= 5


def test_a_gap_below_a_step_still_moves_a_prompt() -> None:
    pacer = LinePacer(0.005)
    for _ in range(9):
        pacer.observe(0.01, 1, 0)
    pacer.observe(0.02, 1, 10)
    assert pacer.prompt_tokens(Demand(1, 500)) == 3


def test_prompts_alone_give_a_start_and_no_more() -> None:
    pacer = LinePacer(None)
    assert pacer.prompt_tokens(Demand(1, 500)) == 32
    pacer.observe(0.1, 0, 100)
    for _ in range(9):
        pacer.observe(0.100, 4, 0)
    for _ in range(40):
        pacer.observe(9.0, 0, 100)
    assert pacer.prompt_tokens(Demand(4, 500)) == 80


def test_slow_machine_still_moves_a_prompt() -> None:
    pacer, machine = GapPacer(0.01, measured(Machine())), Machine()
    gaps, _ = read_prompt(pacer, machine, 64, 500)
    assert max(gaps) <= 1.02 * machine.seconds(96)


def test_no_target_sets_no_limit() -> None:
    assert FreePacer().prompt_tokens(Demand(64, 100000)) is None


def test_slices_leave_running_answers_their_pace() -> None:
    pacer = SlicePacer()
    assert pacer.allowance_s(1) == 0.0
    for seconds in (0.004, 0.004, 0.030, 0.004, 0.004):
        pacer.observe(1, seconds, 0.0)
    assert 0.5 * 0.004 < pacer.allowance_s(1) < 0.004
    # Generating takes longer beside a prompt: the prompt pays for it, but never with everything.
    for _ in range(20):
        pacer.observe(1, 0.006, 0.003)
    assert 0.006 + pacer.allowance_s(1) <= 2 * 0.004
    for _ in range(20):
        pacer.observe(1, 0.020, 0.003)
    # Of an allowance as long as a usual step, three tenths are kept.
    assert pacer.allowance_s(1) == pytest.approx(0.3 * 0.004)


def test_what_is_usual_outlasts_the_reading_of_a_prompt() -> None:
    """Reading a long prompt into tokens takes processors from a dozen steps just ahead of it."""
    pacer = SlicePacer()
    for _ in range(60):
        pacer.observe(1, 0.004, 0.0)
    before_s = pacer.allowance_s(1)
    for _ in range(15):
        pacer.observe(1, 0.007, 0.0)
    assert 0.0 < pacer.allowance_s(1) < before_s
    for _ in range(9):
        pacer.observe(1, 0.004, 0.003)
    assert pacer.allowance_s(1) == pytest.approx(before_s)


def test_slices_follow_what_is_usual_for_as_many_answers() -> None:
    pacer = SlicePacer()
    for num_decodes, seconds in ((1, 0.004), (8, 0.016)):
        for _ in range(9):
            pacer.observe(num_decodes, seconds, 0.0)
    many_s = pacer.allowance_s(8)
    for _ in range(20):
        pacer.observe(1, 0.004, 0.003)
    assert pacer.allowance_s(1) == pytest.approx(many_s / 4)
    # Never seen without a prompt: as it is now.
    for _ in range(20):
        pacer.observe(3, 0.008, 0.003)
    assert pacer.allowance_s(3) == pytest.approx(many_s / 2)
    # What was usual long ago widens nothing.
    assert pacer.allowance_s(8) == pytest.approx(many_s / 2)
