import pytest

from halfbyte.engine.pacing import PrefillPacer


def run_steps(pacer: PrefillPacer, decode_s: float, token_s: float) -> float:
    """Steps of a machine with these costs; how much the last mixed step lasted longer."""
    for _ in range(20):
        pacer.observe(decode_s, 4, 0)
    slowdown = 1.0
    for _ in range(40):
        tokens = pacer.max_prefill_tokens()
        assert tokens is not None
        seconds = decode_s + tokens * token_s
        pacer.observe(seconds, 4, tokens)
        slowdown = seconds / decode_s
    return slowdown


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


def test_first_guess_needs_no_measurement() -> None:
    pacer = PrefillPacer(2.0)
    assert pacer.max_prefill_tokens() == 32
    pacer.observe(0.1, 0, 100)
    assert pacer.max_prefill_tokens() == 32


def test_no_limit_when_none_is_wanted() -> None:
    pacer = PrefillPacer(None)
    pacer.observe(1.0, 1, 0)
    assert pacer.max_prefill_tokens() is None
