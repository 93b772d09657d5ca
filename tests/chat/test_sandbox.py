"""Templates are bounded, and offer what transformers' offer."""

# ruff: noqa: E501 - templates stand on one line

import contextlib
import random
import time
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from halfbyte.chat import sandbox, sandbox_bounds
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
        "{{ ('ab ' * 300000) | wordwrap(1) }}",
        "{% set a = 'x' * 33000000 %}" + "".join(f"{{% set a{i} = a[1:] %}}" for i in range(300)),
        "{% set a = 'x' * 33000000 %}" + "".join(f"{{% set a{i} = a ~ '' %}}" for i in range(300)),
        "{% set a = 'x' * 33000000 %}{{ ([a] * 1000) | string | length }}",
        "{{ ('a' * 1000000).translate({97: 'x' * 1000000}) }}",
        "{{ 'a'.encode().center(10**9) }}",
        "{{ (5).to_bytes(10**9, 'big') }}",
        "{{ ('a,' * 10000000).split(',') | length }}",
        "{{ ('a ' * 10000000).split() | length }}",
        "{{ ('a\n' * 1000) | indent(1000000) }}",
        "{{ ([[1] * 10] * 90000) | sum(start=[]) | length }}",
        "{{ ('%(a)s' * 10000) % {'a': 'x' * 100000} }}",
        "{{ ('{0}' * 10000).format('a' * 100000) }}",
        "{{ (['a'] * 100000) | tojson(separators=('x' * 10000, ':')) }}",
        "{{ {'a': 1} | tojson(indent=1000000) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ ('é' * 1000000).encode('punycode') }}",
        "{{ messages[0].nothing.at.all }}",
        "{{ messages[99].content }}",
        "{{ raise_exception('no, thank you') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a'.translate({97: 'b' * 33000000}) }}",
    ],
)
def test_a_hostile_template_ends_in_one_sentence(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_bounds, "MAX_SECONDS", 0.2)  # the same bound, sooner
    started = time.thread_time()
    with pytest.raises((RequestError, CheckpointError)) as caught:
        ChatTemplate(source, "x").render(HELLO)
    assert time.thread_time() - started < 5
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


# What makes a value of itself twice, and what walks through a value, writes, compares or hashes it.
GROWS = [
    "[V, V]", "(V, V)", "{'a': V, 'b': V}", "dict(a=V, b=V)", "[V] + [V]", "[V] * 2", "V ~ V",
    "'{0}{0}'.format(V)", "'%s%s' % (V, V)", "'%(a)s%(a)s' % {'a': V}", "[V, V] | list",
    "[V, V] | join", "{'a': V, 'b': V}.items()", "{'a': [V].copy(), 'b': V}.values()",
    "{'a': V, 'b': V} | dictsort", "[V, V] | batch(1) | list", "[[V], [V]] | map('list') | list",
    "V | string | replace('a', 'aa')", "[V, V] | groupby(0) | list", "[V, V] | tojson",
    "(V | string)[:] * 2", "namespace(a=V, b=V)", "[V, V] | tojson(indent=2)", "[V, [V] | string]",
    "{'a': V} | items | list + [V]", "[V, V][:]", "cycler(V, [V, V]).next()", "[V, V] | reverse | list",
]  # fmt: skip
WALKS = [
    "V", "V | tojson", "V | string | length", "V == W", "[V].index(W)", "V in [W]", "{(V,): 1}",
    "V | pprint", "V | upper", "'%r' % (V,)", "'{0!r}'.format(V)", "[V, W] | unique | list",
    "[V, W] | sort", "V ~ 'x'", "[V, W] | join", "V | urlize", "V | string | wordwrap(1)",
    "V | string | striptags", "V | escape", "V | string | title", "[V, W].count(W)", "[V, W] | max",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_no_value_grows_without_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled a hundred times in made-up ways, then used: it ends, and little memory is taken."""
    monkeypatch.setattr(sandbox_bounds, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(sandbox_bounds, "MAX_CHARS", 2**20)
    dice = random.Random(seed)

    def doubled(name: str) -> str:
        steps = "".join(
            f"{{% set {name}.v = " + dice.choice(GROWS).replace("V", f"{name}.v") + " %}"
            for _ in range(dice.randrange(1, 4))
        )
        start = dice.choice(["'a'", "['a']", "{'k': 'a'}", "messages", "messages[0].content"])
        return f"{{% set {name} = namespace(v={start}) %}}{{% for i in range(99) %}}{steps}{{% endfor %}}"

    use = dice.choice(WALKS).replace("V", "ns.v").replace("W", "nt.v")
    source = doubled("ns") + doubled("nt") + "{{ " + use + " }}"
    started = time.thread_time()
    tracemalloc.start()
    # Whatever else it raises fails the test.
    with contextlib.suppress(RequestError):
        text = ChatTemplate(source, "x").render(HELLO)
        assert len(text) <= 2**20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.thread_time() - started < 5 and peak < 300 * 2**20, source


def test_long_conversations_are_weighed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that looks through all earlier messages at each does not weigh them each time."""
    messages = typed([{"role": "user", "content": f"message {i}"} for i in range(300)])
    weighed = Counter[int]()
    weight_of = sandbox_bounds.weight_of

    def counting(value: Any, *arguments: Any, **options: Any) -> int:
        weighed[id(value)] += 1
        return weight_of(value, *arguments, **options)

    monkeypatch.setattr(sandbox_bounds, "weight_of", counting)
    monkeypatch.setattr(sandbox, "weight_of", counting)
    source = (
        "{% set ns = namespace(out='', all=[]) %}{% for m in messages %}"
        "{% set earlier = messages[:loop.index0] | selectattr('role', 'equalto', 'user') | list %}"
        "{% set ns.all = ns.all + [m] %}{% set ns.out = ns.out ~ m.content ~ (earlier | length) %}"
        "{% endfor %}{{ ns.out }}"
    )
    text = ChatTemplate(source, "x").render({"messages": messages})
    assert text == "".join(f"message {i}{i}" for i in range(300))
    # What a message holds; the messages themselves are passed on, and looked up.
    assert max(weighed[id(message["content"])] for message in messages) == 1


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
