"""What crosses between a step's tests and its code comes out as it went in, or not at all."""

import collections
import json
import os
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.evals.grading import scicode_wire

wire: Any = scicode_wire  # it is copied into sandboxes and has no types

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.binary(max_size=5)
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-9, 9), inner, max_size=3)
        | st.sets(st.integers() | st.text(max_size=3), max_size=3)
    ),
    max_leaves=8,
)


def crossed(value: Any) -> Any:
    text = json.dumps(wire.encode(value, wire.refer_nothing))
    return wire.decode(json.loads(text), wire.resolve_nothing)


@given(PLAIN)
def test_plain_data_crosses_with_its_types(value: Any) -> None:
    found = crossed(value)
    assert found == value and repr(type(found)) == repr(type(value))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.zeros((0, 3), np.float32),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array(["ab", "c"]),
        np.array([b"ab"]),
        np.array([1, "a", (2, 3), None], dtype=object).reshape(2, 2),
    ],
)
def test_arrays_cross_with_shape_and_type(value: Any) -> None:
    found = crossed(value)
    assert found.dtype == value.dtype and found.shape == value.shape
    assert found.tolist() == value.tolist()


@pytest.mark.parametrize("value", [np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("a")])
def test_numbers_of_numpy_stay_its_numbers(value: Any) -> None:
    assert crossed([value]) == [value]
    if not isinstance(value, np.str_):  # which is a text
        assert crossed(value).dtype == value.dtype


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "lil", "dok"])
def test_sparse_matrices_keep_their_layout(layout: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.random(4, 3, density=0.4, rng=np.random.default_rng(0)).asformat(layout)
    found = crossed(matrix)
    assert found.format == layout and np.array_equal(found.toarray(), matrix.toarray())
    told = wire.encode(matrix, wire.refer_nothing)
    told["p"][0] = "pickle"
    with pytest.raises(ValueError, match="no sparse layout 'pickle'"):
        wire.decode(told, wire.resolve_nothing)


def test_symbols_and_counted_dictionaries_cross_as_what_they_hold() -> None:
    sympy = pytest.importorskip("sympy")
    assert crossed(sympy.Symbol("x")) == sympy.Symbol("x")
    assert (crossed(sympy.Integer(3)), crossed(sympy.Float(0.5))) == (3, 0.5)
    assert crossed(collections.Counter("aab")) == {"a": 2, "b": 1}


def test_what_is_no_plain_data_becomes_a_stand_in() -> None:
    class Own(dict[str, int]):
        pass

    things = [object(), Own(a=1), len, np.array([(1, 2.0)], dtype="i4,f8")]
    made: list[Any] = []

    def refer(value: Any) -> Any:
        made.append(value)
        return {"ref": len(made) - 1}

    told = wire.encode(things, refer)
    assert [type(one) for one in made] == [type(one) for one in things]
    assert wire.decode(told, lambda kind, body: (kind, body)) == [("ref", i) for i in range(4)]
    for thing in things:
        with pytest.raises(TypeError, match="is not plain data"):
            wire.encode(thing, wire.refer_nothing)
    with pytest.raises(ValueError, match="a stand-in 'ref'"):
        wire.decode({"ref": 0}, wire.resolve_nothing)


@pytest.mark.parametrize("name", ["O", "V8", "i4,f8", "M8[s]"])
def test_arrays_of_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="do not cross"):
        wire.decode({"a": [name, [1], "AAAAAAAAAAAAAAAAAAAAAA=="]}, wire.resolve_nothing)


def test_a_channel_ends_where_the_other_side_does() -> None:
    read, write = os.pipe()
    channel = wire.Channel(read, write)
    for message in ({"do": "get"}, ["ä" * 1000], None):
        channel.send(message)
        assert channel.receive() == message
    os.write(write, struct.pack(">Q", wire.MAX_BYTES + 1))
    with pytest.raises(ValueError, match=f"the limit is {wire.MAX_BYTES}"):
        channel.receive()
    os.write(write, struct.pack(">Q", 9) + b'{"cut')
    channel._out.close()
    with pytest.raises(wire.ClosedError):
        channel.receive()
    with pytest.raises(wire.ClosedError):
        channel.receive()
    channel._in.close()


def test_nobody_reads() -> None:
    read, write = os.pipe()
    other_read, other_write = os.pipe()
    channel = wire.Channel(read, other_write)
    os.close(other_read)
    with pytest.raises(wire.ClosedError):
        channel.send({"do": "get"})
    os.close(write)
    channel._in.close()
    with pytest.raises(OSError):
        channel._out.close()


def test_luck_is_shared_only_where_it_changed() -> None:
    kept = random.getstate(), np.random.get_state()
    try:
        one = wire.Luck()
        assert one.changes() == {}
        np.random.seed(3)
        assert set(one.changes()) == {"numpy"}
        random.seed(4)
        told = one.changes()
        assert set(told) == {"python"} and one.changes() == {}
        np.random.seed(5)
        told |= one.changes()
        drawn = random.random(), np.random.random()
        random.seed(1)
        np.random.seed(1)
        other = wire.Luck()
        other.take(json.loads(json.dumps(told)))
        assert other.changes() == {}
        assert (random.random(), np.random.random()) == drawn
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
