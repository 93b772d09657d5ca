"""The process that holds generated code: it defines it once and answers what the tester asks.

Copied into the sandbox of the code, never imported by the package. It sees neither the tests nor
their expected values, and nothing it says is believed to be more than a value.
"""

# mypy: ignore-errors
import sys
import types

from scicode_wire import Channel, ClosedError, Luck, decode, encode


class Worker:
    """Names and objects of the code, and the channel over which they are asked for."""

    def __init__(self, channel, names):
        self._channel, self._names = channel, names
        self._objects, self._numbers = {}, {}
        self._luck = Luck()

    def serve(self):
        """Answer the tester's requests until it has gone."""
        while True:
            self._answer(self._channel.receive())

    def _answer(self, message):
        try:
            if "luck" in message:
                self._luck.take(message["luck"])
            reply = {"ok": encode(self._do(message), self._refer)}
        except ClosedError:
            raise
        except Exception as failure:
            reply = {"error": [type(failure).__name__, str(failure)[:2000]]}
        self._channel.send({**reply, "luck": self._luck.changes()})

    def _do(self, message):
        kind = message["do"]
        if kind == "get":
            return self._names[message["name"]]
        thing = self._objects[message["of"]]
        if kind == "attribute":
            return getattr(thing, message["name"])
        if kind == "set":
            return setattr(thing, message["name"], self._decoded(message["value"]))
        arguments = self._decoded(message["arguments"])
        return thing(*arguments, **self._decoded(message["named"]))

    def _decoded(self, data):
        return decode(data, self._resolve)

    def _refer(self, value):
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects[number] = value  # kept, so that its id stays its own
        return {"ref": number}

    def _resolve(self, kind, body):
        if kind == "ref":
            return self._objects[body]
        assert kind == "function", kind

        def function(*arguments, **named):
            self._channel.send(
                {
                    "call": body,
                    "arguments": encode(list(arguments), self._refer),
                    "named": encode(named, self._refer),
                    "luck": self._luck.changes(),
                }
            )
            while "do" in (message := self._channel.receive()):
                self._answer(message)  # the test's function asks for the code's in turn
            self._luck.take(message.get("luck", {}))
            if "error" in message:
                raise RuntimeError(": ".join(message["error"]))
            return self._decoded(message["ok"])

        return function


def main(read_fd, write_fd):
    """Run the code in /box/code.py as the main module, then serve."""
    with open("/box/code.py", encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    module = types.ModuleType("__main__")
    module.__file__ = "/box/code.py"
    sys.modules["__main__"] = module
    exec(compile(source, "/box/code.py", "exec"), module.__dict__)
    try:
        Worker(Channel(read_fd, write_fd), module.__dict__).serve()
    except ClosedError:
        return
