"""Templates are bounded, and offer what transformers' offer."""

# ruff: noqa: E501 - templates stand on one line

import time

import pytest

from halfbyte.chat import sandbox
from halfbyte.chat.sandbox import MAX_SOURCE, ChatTemplate
from halfbyte.chat.written import typed
from halfbyte.errors import CheckpointError, RequestError

HELLO = {"messages": typed([{"role": "user", "content": "hi " * 1000}])}
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}"


@pytest.mark.parametrize(
    "source",
    [
        LONG + "{% endfor %}{% endfor %}",
        LONG + "{% set x = 1 %}{% endfor %}{% endfor %}",
        LONG + "{% if a == b %}{% continue %}{% endif %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ range(10**9) }}",
        "{{ 1 / 0 }}",
        "{{ 1 // 0 }}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ 'a' | indent(10**9, first=true) }}",
        "{{ {} | tojson(indent=10**9) }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{% set ns = namespace(t='aaaa') %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% set ns = namespace(t='aaaa') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t=[1]) %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = ns.t.replace('a', ns.t) %}{% endfor %}",
        "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = ns.t | replace('a', ns.t) %}{% endfor %}",
        "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = ns.t.join([ns.t, ns.t]) %}{% endfor %}",
        "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t %}{{ ns.t }}{{ ns.t }}{% endset %}{% endfor %}",
        "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = '{0}{0}'.format(ns.t) %}{% endfor %}",
        "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = '%s%s' % (ns.t, ns.t) %}{% endfor %}",
        "{{ messages[0].nothing.at.all }}",
        "{{ messages[99].content }}",
        "{{ raise_exception('no, thank you') }}",
    ],
)
def test_a_hostile_template_ends_in_one_sentence(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)  # the same bound, sooner
    started = time.thread_time()
    with pytest.raises((RequestError, CheckpointError)) as caught:
        ChatTemplate(source, "x").render(HELLO)
    assert time.thread_time() - started < 5
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% nothing %}",
        "{{ x | no_such_filter }}",
        "{% for a in b %}" * 200 + "{% endfor %}" * 200,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (MAX_SOURCE + 1),
    ],
)
def test_a_template_that_does_not_compile_is_named(source: str) -> None:
    with pytest.raises(CheckpointError, match="folder/file: ") as caught:
        ChatTemplate(source, "folder/file")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'b': 'é', 'a': [1]} | tojson }}", '{"b": "é", "a": [1]}'),
        ("{{ {'b': 'é'} | tojson(ensure_ascii=True) }}", '{"b": "\\u00e9"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}", '{"a":2,"b":1}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ [{'n': 'a'}, {'n': 'b'}] | join('+', attribute='n') }}", "a+b"),
        ("{{ 'a%sb%%' % 'x' }}{{ '%(k)s' % {'k': 1} }}", "axb%1"),
        ("{{ '{0}{1:>3}{x}{{}}'.format(1, 2, x='y') }}", "1  2y{}"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ documents is none }}", "True"),
        ("{{ 2 ** 10 }} {{ 7 % 4 }} {{ [1] + [2] }} {{ 3 * 'ab' }}", "1024 3 [1, 2] ababab"),
    ],
)
def test_what_templates_use_works(source: str, expected: str) -> None:
    assert ChatTemplate(source, "x").render({"documents": None}) == expected
