"""What the two processes of a SciCode step say to each other: plain data in JSON.

Copied into both sandboxes, never imported by the package. `scicode_tester` runs the tests and
asks; `scicode_worker` holds the generated code and answers. A value is a number, text, an array, a
sparse matrix, or a list, tuple, set or dictionary of those; whatever else the code makes (objects
of its classes, functions) stays on its side and crosses as a number that stands for it. The tester
believes nothing: sizes and types are checked, and no text is ever evaluated.
"""

# mypy: ignore-errors
import base64
import json
import os
import random
import struct
import sys

import numpy as np

KINDS = "biufcSU"  # of array elements: truth values, numbers, texts; no objects, no records
MAX_BYTES = 1 << 30  # of one message
_DICTS = ("dict", "OrderedDict", "defaultdict", "Counter")


class ClosedError(Exception):
    """Raised when the process at the other end has gone."""


class Channel:
    """Messages over two pipes; a message is its length and a JSON text."""

    def __init__(self, read_fd, write_fd):
        self._in, self._out = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")

    def send(self, message):
        """Write one message. Raises ClosedError if nobody reads it."""
        text = json.dumps(message).encode()
        try:
            self._out.write(struct.pack(">Q", len(text)) + text)
            self._out.flush()
        except OSError as failure:
            raise ClosedError from failure

    def receive(self):
        """Wait for one message. Raises ClosedError at the end, ValueError for an absurd length."""
        head = self._in.read(8)
        if len(head) < 8:
            raise ClosedError
        (size,) = struct.unpack(">Q", head)
        if size > MAX_BYTES:
            raise ValueError(f"a message of {size} bytes; the limit is {MAX_BYTES}")
        text = self._in.read(size)
        if len(text) < size:
            raise ClosedError
        return json.loads(text)


def encode(value, refer):
    """A value as JSON; `refer` makes a stand-in of what is not plain data."""
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, np.generic):
        if value.dtype.kind in KINDS:
            return {"n": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
        return refer(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else {"i": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return _encode_array(value, refer)
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for kind, type_ in (("t", tuple), ("s", (set, frozenset))):
        if isinstance(value, type_):
            return {kind: [encode(item, refer) for item in value]}
    if type(value).__name__ in _DICTS and isinstance(value, dict):
        return {"d": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    if isinstance(value, range):
        return {"r": [value.start, value.stop, value.step]}
    return _encode_other(value, refer)


def _encode_array(value, refer):
    plain = np.asarray(value)
    if plain.dtype.kind in KINDS:
        data = base64.b64encode(np.ascontiguousarray(plain).tobytes()).decode()
        return {"a": [plain.dtype.str, list(plain.shape), data]}
    if plain.dtype.kind == "O":
        return {"o": [list(plain.shape), [encode(item, refer) for item in plain.ravel()]]}
    return refer(value)


def _encode_other(value, refer):
    sparse, sympy = sys.modules.get("scipy.sparse"), sys.modules.get("sympy")
    if sparse is not None and sparse.issparse(value):
        coo = value.tocoo()
        parts = [encode(part, refer) for part in (coo.data, coo.row, coo.col)]
        return {"p": [value.format, list(value.shape), *parts]}
    if sympy is not None and isinstance(value, sympy.Symbol):
        return {"y": str(value.name)}
    if sympy is not None and isinstance(value, sympy.Number):
        return int(value) if value.is_Integer else float(value)
    return refer(value)


def decode(data, resolve):
    """The value of a JSON text that `encode` made; `resolve` turns stand-ins into objects."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, body),) = data.items()
    if kind == "a":
        name, shape, text = body
        return _array(name, base64.b64decode(text)).reshape([int(n) for n in shape])
    if kind == "n":
        name, text = body
        return _array(name, base64.b64decode(text)).reshape(())[()]
    if kind == "o":
        shape, items = body
        found = np.empty(len(items), dtype=object)
        for index, item in enumerate(items):
            found[index] = decode(item, resolve)
        return found.reshape([int(n) for n in shape])
    if kind == "t":
        return tuple(decode(item, resolve) for item in body)
    if kind == "s":
        return {decode(item, resolve) for item in body}
    if kind == "d":
        return {decode(key, resolve): decode(item, resolve) for key, item in body}
    return _decode_rare(kind, body, resolve)


def _decode_rare(kind, body, resolve):
    if kind == "i":
        return int(body, 16)
    if kind == "c":
        return complex(float(body[0]), float(body[1]))
    if kind == "b":
        return base64.b64decode(body)
    if kind == "r":
        return range(*(int(n) for n in body))
    if kind == "p":
        return _sparse(*body, resolve)
    if kind == "y":
        import sympy

        return sympy.Symbol(str(body))
    return resolve(kind, body)


def _array(name, data):
    dtype = np.dtype(str(name))
    if dtype.kind not in KINDS or dtype.hasobject:
        raise ValueError(f"arrays of {name} do not cross")
    return np.frombuffer(data, dtype).copy() if dtype.itemsize else np.zeros(1, dtype)


def _sparse(layout, shape, data, row, column, resolve):
    from scipy import sparse

    if layout not in ("coo", "csr", "csc", "bsr", "dia", "dok", "lil"):
        raise ValueError(f"no sparse layout {layout!r}")
    places = (decode(row, resolve), decode(column, resolve))
    shape = tuple(int(n) for n in shape)
    return sparse.coo_matrix((decode(data, resolve), places), shape=shape).asformat(layout)


class Luck:
    """The state of NumPy's and Python's random numbers, kept equal on both sides.

    A test seeds the generator and the code draws from it, as if they were one program.
    """

    def __init__(self):
        self._numpy, self._python = self._states()

    def _states(self):
        name, keys, *rest = np.random.get_state()
        return (name, keys.tobytes(), *rest), random.getstate()

    def changes(self):
        """What changed since the last exchange, to be sent along; {} if nothing did."""
        found = {}
        now = self._states()
        if now[0] != self._numpy:
            found["numpy"] = encode(tuple(np.random.get_state()), refer_nothing)
        if now[1] != self._python:
            found["python"] = encode(now[1], refer_nothing)
        self._numpy, self._python = now
        return found

    def take(self, changes):
        """Set the random states that the other side has sent."""
        if "numpy" in changes:
            np.random.set_state(decode(changes["numpy"], resolve_nothing))
        if "python" in changes:
            random.setstate(decode(changes["python"], resolve_nothing))
        self._numpy, self._python = self._states()


def refer_nothing(value):
    """For `encode`, where all must be plain data."""
    raise TypeError(f"{type(value).__name__} is not plain data")


def resolve_nothing(kind, body):
    """For `decode`, where all must be plain data."""
    raise ValueError(f"a stand-in {kind!r} where plain data must be")
