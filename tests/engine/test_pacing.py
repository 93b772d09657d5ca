import pytest

from halfbyte.engine.plan.pacing import PrefillPacer, SlicePacer


def run_prompt(
    pacer: PrefillPacer, decode_s: float, token_s: float, num_steps: int = 40
) -> list[float]:
    """Steps beside a long prompt on a machine with these costs; how much longer each lasts."""
    slowdowns = []
    for _ in range(num_steps):
        tokens = pacer.max_prefill_tokens()
        assert tokens is not None
        seconds = decode_s + tokens * token_s
        pacer.observe(seconds, 4, tokens)
        slowdowns.append(seconds / decode_s)
    return slowdowns


def run_steps(pacer: PrefillPacer, decode_s: float, token_s: float) -> float:
    """Steps without and with a prompt; how much the slowest of the last mixed ones took longer."""
    for _ in range(20):
        pacer.observe(decode_s, 4, 0)
    return max(run_prompt(pacer, decode_s, token_s)[-20:])


@pytest.mark.parametrize(
    ("decode_s", "token_s"), [(0.012, 0.0005), (0.050, 0.0015), (0.025, 0.0003)]
)
def test_running_answers_keep_half_their_pace(decode_s: float, token_s: float) -> None:
    assert 1.5 < run_steps(PrefillPacer(2.0), decode_s, token_s) <= 2.0


def test_slow_machine_still_moves_a_prompt() -> None:
    pacer = PrefillPacer(2.0)
    run_steps(pacer, 0.010, 0.010)
    tokens = pacer.max_prefill_tokens()
    assert tokens is not None and tokens > 0


def test_steps_that_waited_for_something_else_do_not_widen_the_next() -> None:
    pacer = PrefillPacer(2.0)
    for seconds in (0.003, 0.003, 0.060, 0.170, 0.060, 0.040, 0.030, 0.003, 0.003, 0.003, 0.003):
        pacer.observe(seconds, 1, 0)
    assert max(run_prompt(pacer, 0.003, 0.0003)[20:]) <= 2.0


@pytest.mark.parametrize(("before", "now"), [(0.030, 0.003), (0.003, 0.030)])
def test_pace_is_measured_again_while_prompts_keep_coming(before: float, now: float) -> None:
    pacer = PrefillPacer(2.0)
    for _ in range(20):
        pacer.observe(before, 1, 0)
    slowdowns = run_prompt(pacer, now, 0.0003, num_steps=200)[-34:]
    assert 1.5 < max(slowdowns) <= 2.0
    # One step in seventeen carries no prompt.
    assert slowdowns.count(1.0) == 2


def test_first_guess_needs_no_measurement() -> None:
    pacer = PrefillPacer(2.0)
    assert pacer.max_prefill_tokens() == 32
    pacer.observe(0.1, 0, 100)
    assert pacer.max_prefill_tokens() == 32


def test_prompts_alone_give_a_start_and_no_more() -> None:
    """The first slice beside answers is sized by them; then those beside answers count."""
    pacer = PrefillPacer(2.0)
    pacer.observe(0.1, 0, 100)  # a millisecond a token
    for _ in range(9):
        pacer.observe(0.100, 4, 0)
    assert pacer.max_prefill_tokens() == 80  # four fifths of one decode's hundred milliseconds
    for _ in range(40):
        pacer.observe(9.0, 0, 100)
    assert pacer.max_prefill_tokens() == 80
    # Half as fast beside answers: a fifth of the way there after each step.
    pacer.observe(0.100 + 80 * 0.002, 4, 80)
    assert pacer.max_prefill_tokens() == 66  # 80 / 1.2


def test_no_limit_when_none_is_wanted() -> None:
    pacer = PrefillPacer(None)
    pacer.observe(1.0, 1, 0)
    assert pacer.max_prefill_tokens() is None


def test_slices_leave_running_answers_their_pace() -> None:
    pacer = SlicePacer(2.0)
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
    assert 0.0 < pacer.allowance_s(1) < 0.5 * 0.004


def test_what_is_usual_outlasts_the_reading_of_a_prompt() -> None:
    """Reading a long prompt into tokens takes processors from a dozen steps just ahead of it."""
    pacer = SlicePacer(2.0)
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
    pacer = SlicePacer(2.0)
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
