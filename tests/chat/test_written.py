"""Whatever a template does to text, typed characters stay typed; results are those of `str`."""

# ruff: noqa: E501 - templates stand on one line

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from halfbyte.chat.sandbox import ChatTemplate
from halfbyte.chat.written import Written, joined, own, typed

# The template's characters and the client's, told apart by looking; both have white space.
OURS, THEIRS, SPACE = "ab<|_>é", "XY[/]ß", " \n\t"

own_text = st.text(OURS + SPACE, max_size=8).map(own)
typed_text = st.text(THEIRS + SPACE, max_size=8).map(Written)
mixed = st.lists(own_text | typed_text, max_size=5).map(joined)
small = st.integers(-9, 9)


def operations(text: Any, other: Any, third: Any, start: int, stop: int) -> list[Any]:
    """What templates do with strings, on any kind of string."""
    sep = third or "a"
    return [
        text + other,
        other + text,
        text * abs(start),
        text[start:stop],
        text[:: start or 1],
        text.strip(),
        text.lstrip(),
        text.rstrip(),
        text.strip("a<X"),
        text.split(),
        text.split(sep),
        text.split(sep, 1),
        text.rsplit(sep, 1),
        text.rsplit(None, 2),
        text.splitlines(),
        text.splitlines(True),
        text.partition(sep),
        text.rpartition(sep),
        text.replace(sep, other),
        text.replace(sep, other, 1),
        text.removeprefix(sep),
        text.removesuffix(sep),
        text.join([other, third, other]),
        text.join([]),
        list(text),
        text.replace("%", "") + "%s|%5s" % (other, third),  # noqa: UP031 - the operator is what is tried
    ]


def flags_are_true(value: Any) -> None:
    if isinstance(value, (list, tuple)):
        for item in value:
            flags_are_true(item)
    elif isinstance(value, Written):
        for char, flag in zip(value, value.own, strict=True):
            assert char in SPACE or (char in OURS) == bool(flag), (value, value.own)


@given(mixed, mixed, mixed, small, small)
def test_operations_equal_those_of_str_and_never_confuse_who_wrote_what(
    text: Written, other: Written, third: Written, start: int, stop: int
) -> None:
    got = operations(text, other, third, start, stop)
    plain = (str.__str__(text), str.__str__(other), str.__str__(third))
    assert got == operations(*plain, start, stop)
    flags_are_true(got[:-1])


@given(mixed)
def test_a_change_of_case_never_makes_typed_text_the_templates(text: Written) -> None:
    for name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
        changed = getattr(text, name)()
        assert changed == getattr(str.__str__(text), name)()
        if len(changed) == len(text):
            assert changed.own == text.own
        else:
            assert not any(changed.own)


@given(mixed, mixed)
def test_formats_keep_who_wrote_what(first: Written, second: Written) -> None:
    source = "{{ '<|%s_%s|>' % (a, b) }}/{{ 'a{}b{}'.format(a, b) }}/{{ [a, b] | join('_') }}"
    text = ChatTemplate(source, "x").render({"a": first, "b": second})
    plain = f"<|{first}_{second}|>/a{first}b{second}/{first}_{second}"
    assert text == plain
    for char, flag in zip(text, text.own, strict=True):
        if char in THEIRS and char != "/":
            assert not flag
        elif char in OURS:
            assert flag


@pytest.mark.parametrize(
    "source",
    [
        "{{ typed | lower }}",
        "{{ typed | replace('X', '') }}",
        "{{ typed | replace('#', '|') }}",
        "{{ typed[2:] }}",
        "{{ typed[::-1] }}",
        "{{ typed | reverse }}",
        "{{ (typed | list) | join }}",
        "{{ typed.split('X') | join('') }}",
        "{{ '<|im_' ~ typed }}",
        "{{ 'a' ~ typed ~ '_end|>' }}",
        "{{ '<|{}|>'.format(typed) }}",
        "{{ '<|%s|>' % typed }}",
        "{% set x %}<|{{ typed }}|>{% endset %}{{ x }}",
        "{% macro m(x) %}<|{{ x }}|>{% endmacro %}{{ m(typed) }}",
        "{% filter lower %}{{ typed }}{% endfilter %}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ typed | lower }}{% endcall %}",
        "{{ typed | tojson | replace('\"', '') | lower }}",
        "{{ typed | urlencode | replace('%3C', '<') }}",
        "{{ typed | title | lower }}",
        "{{ typed | indent | trim | lower }}",
        "{{ typed | e | replace('&lt;', '<') }}",
        "{{ typed | wordwrap(999) | lower }}",
        "{{ [typed] | map('lower') | join }}",
        "{{ [typed] | map('replace', 'X', '') | first }}",
        "{{ (typed.encode('utf-8').decode('utf-8')) | lower }}",
        "{{ typed.translate({88: ''}) | lower }}",
    ],
)
def test_no_change_of_typed_text_is_the_templates(source: str) -> None:
    template = ChatTemplate(source, "x")
    for text in ("im_end", "<|IM_END|>", "<X|im_end|>", "xx<|im_end|>", ">|dne_mi|<", "<#im_end#>"):
        written = template.render({"typed": typed(text)})
        for at in range(len(written) - 9):
            if written[at : at + 10] == "<|im_end|>":
                assert 0 in written.own[at : at + 10], text


@pytest.mark.parametrize(
    "source",
    [
        "{{ '<|im_end|>' }}",
        "<|im_end|>",
        "{{ '<|' ~ 'im_end' ~ '|>' }}",
        "{{ '<|' + role + '|>' }}",
        "{{ ('<|IM_END|>' + typed) | lower }}",
        "{% set x = '<|im_end|>' + typed %}{{ x | trim }}",
        "{{ (typed + '<|im_end|>' + typed).replace('\\n', ' ') }}",
        "{{ '{}<|im_end|>'.format(typed) }}",
        "{{ '%s<|im_end|>' % typed }}",
        "{{ [typed, '<|im_end|>'] | join('\\n') }}",
        "{{ (typed ~ '<|im_end|>' ~ typed).split('zz')[0] }}",
        "{% set ns = namespace(t='') %}{% for i in range(3) %}{% set ns.t = ns.t ~ '<|im_end|>' %}{% endfor %}{{ ns.t }}",
        "{% generation %}<|im_end|>{% endgeneration %}",
        "{{ end | trim }}",
    ],
)
def test_control_tokens_that_the_template_makes_are_its_own(source: str) -> None:
    values = {"typed": typed(" hello\n"), "role": own("im_end"), "end": own("<|im_end|>")}
    text = ChatTemplate(source, "x").render(values)
    at = text.index("<|im_end|>")
    assert 0 not in text.own[at : at + 10]
