"""The process that runs the tests of a SciCode step; the code under test lives in another one.

Copied into the tests' own sandbox, never imported by the package. NumPy, the expected values and
the comparisons here are out of the code's reach: a function of the code is a `Remote` whose calls
go over the channel and come back as plain data.
"""

# mypy: ignore-errors
import ast
import builtins
import sys

import scicode_runtime
from scicode_wire import Channel, ClosedError, Luck, decode, encode


class Remote:
    """A function, class or object of the code, in the other process.

    It can be called, and asked for attributes; it is equal to nothing, true of nothing, and no
    number: what a test compares must be plain data.
    """

    __slots__ = ("_number", "_side")

    def __init__(self, side, number):
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **named):
        """Call the object in its own process; returns what it gave."""
        return self._side.call(self._number, arguments, named)

    def __getattr__(self, name):
        if name.startswith("__"):  # numpy and copy look for protocols, of which there are none
            raise AttributeError(name)
        return self._side.ask({"do": "attribute", "of": self._number, "name": name})

    def __setattr__(self, name, value):
        side = self._side
        data = encode(value, side.refer)
        side.ask({"do": "set", "of": self._number, "name": name, "value": data})

    def _refused(self, *_):
        raise TypeError(
            "the code returned something that is not a number, an array or other plain data"
        )

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refused
    __hash__ = object.__hash__


class Side:
    """The process that runs the code, as the tester sees it."""

    def __init__(self, channel):
        self._channel = channel
        self._functions = []
        self._luck = Luck()

    def ask(self, message):
        """Send a question and wait for its answer; meanwhile the code may call our functions."""
        self._channel.send({**message, "luck": self._luck.changes()})
        while True:
            reply = self._channel.receive()
            self._luck.take(reply.get("luck", {}))
            if "call" in reply:
                self._channel.send({**self._run(reply), "luck": self._luck.changes()})
            elif "error" in reply:
                name, text = map(str, reply["error"])
                kind = getattr(builtins, name, None)
                is_known = isinstance(kind, type) and issubclass(kind, Exception)
                raise (kind if is_known else RuntimeError)(text if is_known else f"{name}: {text}")
            else:
                return decode(reply["ok"], self._resolve)

    def call(self, number, arguments, named):
        """Call an object of the code; what it returns is plain data or a `Remote`."""
        message = {"do": "call", "of": number}
        message["arguments"] = encode(list(arguments), self.refer)
        message["named"] = encode(dict(named), self.refer)
        return self.ask(message)

    def _run(self, request):
        """Call a function of the tests for the code."""
        function = self._functions[request["call"]]
        arguments = decode(request["arguments"], self._resolve)
        named = decode(request["named"], self._resolve)
        try:
            return {"ok": encode(function(*arguments, **named), self.refer)}
        except ClosedError:
            raise
        except Exception as failure:
            return {"error": [type(failure).__name__, str(failure)[:2000]]}

    def refer(self, value):
        """A stand-in for what is not plain data: an object of the code, or a function of ours."""
        if isinstance(value, Remote):
            return {"ref": value._number}
        if not callable(value):
            raise TypeError(
                f"{type(value).__name__} cannot be given to the code: it is not plain data"
            )
        self._functions.append(value)
        return {"function": len(self._functions) - 1}

    def _resolve(self, kind, body):
        if kind != "ref" or not isinstance(body, int):
            raise ValueError(f"a stand-in {kind!r}")
        return Remote(self, body)


def names_of(tests):
    """Names of the code under test that its tests read."""
    trees = [ast.parse(test) for test in tests]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return sorted({node.id for node in nodes if isinstance(node, ast.Name)})


def run(step, read_fd, write_fd):
    """Run all tests of a step in order, in one name space, as the data set's own program does.

    step  dependencies and tests (texts), functions (names that the headers define), targets (path,
          step number; empty: there are none)
    """
    count = len(step["tests"])
    place = step["targets"]
    targets = scicode_runtime.read_targets(*place, count) if place else [None] * count
    names = {"__name__": "__main__"}
    exec(compile(step["dependencies"], "dependencies", "exec"), names)
    side = Side(Channel(read_fd, write_fd))
    for name in names_of(step["tests"]):
        is_given = name in names or hasattr(builtins, name) or name == "target"
        if name in step["functions"] or not is_given:
            try:
                names[name] = side.ask({"do": "get", "name": name})
            except KeyError:
                continue  # defined by the tests, or by nobody
    for number, test in enumerate(step["tests"], 1):
        names["target"] = targets[number - 1]
        exec(compile(test, f"test {number}", "exec"), names)


def main(step, read_fd, write_fd):
    """Run the tests of a step; the exit status is 0 if every test held."""
    scicode_runtime.harden()
    for name in ("scicode", "scicode.compare", "scicode.compare.cmp"):
        sys.modules[name] = scicode_runtime
    try:
        run(step, read_fd, write_fd)
    except ClosedError:
        sys.stderr.write("the code's process ended before its tests did\n")
        return 1
    except SystemExit:
        sys.stderr.write("a test left the program\n")
        return 1
    sys.stdout.write(f"\n{step['token']}\n")
    sys.stdout.flush()
    return 0
