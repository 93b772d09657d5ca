"""The corpus of hostile requests: name, path, body, and the statuses that are right."""

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]


class Case(NamedTuple):
    """One request; `body` is JSON unless it is bytes."""

    name: str
    path: str
    body: Any
    statuses: tuple[int, ...] = (400,)
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()


def corpus(control_names: list[str]) -> list[Case]:
    """All of them; `control_names` are typed as text."""
    groups = (_bodies(), _shapes(), _values(), _strings(control_names), _schemas(), _tools())
    cases = [case for group in (*groups, _images(), _prompts(), _http()) for case in group]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def chat(**change: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 2, **change}


def said(content: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": content}])


def _bodies() -> Iterator[Case]:
    """What is no JSON, or no object."""
    broken: dict[str, bytes] = {
        "empty": b"",
        "blank": b" \n\t",
        "brace": b"{",
        "cut string": b'{"model": "tin',
        "number": b"42",
        "null": b"null",
        "list": b"[]",
        "string": b'"hello"',
        "utf-16": '{"model": "tiny"}'.encode("utf-16"),
        "latin-1": '{"model": "é"}'.encode("latin-1"),
        "byte order mark": b"\xef\xbb\xbf{}",
        "nan": b'{"model": "tiny", "messages": [], "temperature": NaN}',
        "infinity": b'{"model": "tiny", "messages": [], "top_p": -Infinity}',
        "huge exponent": b'{"model": "tiny", "messages": [], "temperature": 1e9999}',
        "lone surrogate": b'{"model": "tiny", "messages": [{"role": "user", '
        b'"content": "\\udc00"}]}',
        "deep lists": b"[" * 200_000,
        "deep objects": b'{"a":' * 50_000,
        "deep and closed": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        "trailing comma": b'{"model": "tiny",}',
        "two values": b"{} {}",
        "comment": b'{"model": "tiny" /* x */}',
        "zero bytes": b"\0" * 1000,
        "form": b"model=tiny&messages=x",
        "multipart": b"--x\r\nContent-Disposition: form-data\r\n\r\n{}\r\n--x--",
        "huge integer": b'{"model": "tiny", "messages": [], "seed": ' + b"9" * 5000 + b"}",
    }
    for name, body in broken.items():
        yield Case(f"body: {name}", CHAT, body)
    for path in (TEXT, RESPONSES, "/tokenize", "/detokenize"):
        yield Case(f"body: brace at {path}", path, b"{")
        yield Case(f"body: list at {path}", path, b"[1]")
        yield Case(f"body: nothing asked at {path}", path, {})


def _shapes() -> Iterator[Case]:
    """Messages that are no messages."""
    messages: dict[str, Any] = {
        "absent": None,
        "a string": "Hello",
        "an object": {"role": "user", "content": "x"},
        "numbers": [1, 2],
        "nested lists": [[HELLO]],
        "no role": [{"content": "x"}],
        "number as role": [{"role": 1, "content": "x"}],
        "unknown role": [{"role": "root", "content": "x"}],
        "no content": [{"role": "user"}],
        "number as content": [{"role": "user", "content": 5}],
        "object as content": [{"role": "user", "content": {"text": "x"}}],
        "empty parts": [{"role": "user", "content": []}],
        "null part": [{"role": "user", "content": [None]}],
        "unknown part": [{"role": "user", "content": [{"type": "audio"}]}],
        "part without text": [{"role": "user", "content": [{"type": "text"}]}],
        "assistant only": [{"role": "assistant", "content": "x"}],
        "system only": [{"role": "system", "content": "x"}],
        "tool without call": [*HELLO, {"role": "tool", "tool_call_id": "a", "content": "x"}],
        "tool without id": [*HELLO, {"role": "tool", "content": "x"}],
        "late system": [
            *HELLO,
            {"role": "assistant", "content": "x"},
            {"role": "system", "content": "x"},
        ],
        "two thoughts": [
            *HELLO,
            {"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"},
            *HELLO,
        ],
        "call with broken arguments": [*HELLO, _calling('{"a":')],
        "call with a list": [*HELLO, _calling("[]")],
        "call with a bad name": [*HELLO, _calling("{}", name="")],
        "call with an empty id": [*HELLO, _calling("{}", call_id="")],
        "call with a brace": [*HELLO, _calling("{"), *HELLO],
        "result nobody waits for": [
            *HELLO,
            _calling("{}"),
            {"role": "tool", "tool_call_id": "b", "content": "x"},
        ],
    }
    for name, value in messages.items():
        yield Case(f"messages: {name}", CHAT, chat(messages=value))
    # What clients do send: fields that nobody knows, calls that somebody broke into.
    answered = {
        "empty assistant": [*HELLO, {"role": "assistant"}, *HELLO],
        "constructor": [{"role": "user", "content": "x", "__class__": "y"}],
        "call without result": [*HELLO, _calling("{}"), *HELLO],
        "call that was cut off": [*HELLO, _calling('{"a": [1, "b'), *HELLO],
    }
    for name, value in answered.items():
        yield Case(f"messages: {name}", CHAT, chat(messages=value), (200,))
    yield Case("messages: 5000", CHAT, chat(messages=HELLO * 5000))
    yield Case("messages: over the context", CHAT, said("word " * 20_000))


def _calling(arguments: str, name: str = "f", call_id: str = "a") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "tool_calls": [call]}


def _values() -> Iterator[Case]:
    """Parameters of the wrong type or size."""
    values: dict[str, list[Any]] = {
        "model": ["", "../../etc/passwd", "tiny\0", "x" * 10_000],
        "temperature": [-1, 2.1, "hot", [], True, 10**400],
        "top_p": [0, 1.1, -1],
        "top_k": [-2, 1.5, 2**40],
        "min_p": [2],
        "n": [0, -1, 17, 10**9, 1.5, "2"],
        "max_tokens": [0, -5, 10**12, "all"],
        "seed": [2**80, 1.5, "x"],
        "stop": ["", [""], ["x"] * 17, [1], {"a": 1}, "y" * 2000],
        "logit_bias": [
            {"a": 1},
            {"-1": 1},
            {"5": 1000},
            {"10000000": 1},
            [1],
            {"1e2": 1},
            {"²": 1},
        ],
        "presence_penalty": [3],
        "repetition_penalty": [0, -1],
        "logprobs": [5, "yes"],
        "top_logprobs": [5, -1, 100],
        "stream": ["yes", 1],
        "stream_options": [{"include_usage": "x"}, {"x": 1}, True],
        "reasoning_effort": ["MEDIUM", "HIGH", 5, "high; drop table"],
        "max_reasoning_tokens": [-1, "x"],
        "min_tokens": [-1, 100],
        "stop_token_ids": [[-1], [10**9], ["x"]],
        "functions": [[{"name": "f"}]],
        "modalities": [["audio"], ["text", "image"]],
        "audio": [{"voice": "x"}],
    }
    # Left out with a warning, taken as the nearest, or without a meaning here.
    answered = {
        "user_id": 1,
        "reasoning_effort": "medium",
        "prediction": {"type": "content"},
        "__proto__": {"model": "x"},
        "": {"": None},
        "\0": "\0",
    }
    for field, value in answered.items():
        yield Case(f"value: {field!r} is answered", CHAT, chat(**{field: value}), (200,))
    for field, bad in values.items():
        for number, value in enumerate(bad):
            statuses = (404,) if field == "model" else (400,)
            if field == "temperature" and value == 10**400:
                value = 1e308
            yield Case(f"value: {field} {number}", CHAT, chat(**{field: value}), statuses)


def _strings(control_names: list[str]) -> Iterator[Case]:
    """Odd text that must simply be answered."""
    texts = {
        "empty": "",
        "zero byte": "a\0b",
        "right to left": "\u202eabc\u202c",
        "combining": "e" + "\u0301" * 300,
        "emoji": "\U0001f469\u200d\U0001f680" * 30,
        "private use": "\ue000\uf8ff" * 20,
        "noncharacters": "\uffff\ufdd0",
        "controls": "".join(map(chr, range(32))),
        "jinja": "{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
        "lark": 'start: "x"',
        "html": "<script>alert(1)</script>",
        "sse": "data: [DONE]\n\ndata: {}\n\n",
        "every control token": "".join(control_names)[:1500],
        "broken control token": "[INS" + "T]" + "</" + "s>",
    }
    for name, text in texts.items():
        yield Case(f"text: {name}", CHAT, said(text), (200,))
    for name in control_names[:8]:
        yield Case(f"text: {name} in a stream", CHAT, {**said(name), "stream": True}, (200,))


def _schemas() -> Iterator[Case]:
    def form(schema: Any, strict: bool = True) -> dict[str, Any]:
        inner = {"name": "x", "schema": schema, "strict": strict}
        return chat(response_format={"type": "json_schema", "json_schema": inner})

    deep: Any = {"type": "string"}
    for _ in range(150):
        deep = {"type": "array", "items": deep}
    circular = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    schemas: dict[str, tuple[Any, tuple[int, ...]]] = {
        "not": ({"not": {}}, (400,)),
        "if": ({"if": {"type": "string"}, "then": {"minLength": 1}}, (400,)),
        "unknown type": ({"type": "banana"}, (400,)),
        "remote reference": ({"$ref": "http://127.0.0.1/schema"}, (400,)),
        "file reference": ({"$ref": "file:///etc/passwd"}, (400,)),
        "circular reference": (circular, (200, 400)),
        "nested": (deep, (400,)),
        "no value fits": ({"type": "string", "minLength": 5, "maxLength": 1}, (200, 400)),
        "exponential pattern": ({"type": "string", "pattern": "^(a+)+$"}, (200, 400)),
        "counted pattern": ({"type": "string", "pattern": "(x{1000}){1000}"}, (200, 400)),
        "broken pattern": ({"type": "string", "pattern": "("}, (400,)),
        "many values": ({"enum": [f"value {i}" for i in range(20_000)]}, (200, 400)),
        "large": ({"description": "x" * 300_000}, (400,)),
        "long strings": ({"type": "string", "maxLength": 10**9}, (200, 400)),
        "own options": ({"type": "object", "x-guidance": {"whitespace_pattern": "("}}, (200,)),
        "not an object": ("string", (400,)),
        "empty enum": ({"enum": []}, (200, 400)),
    }
    for name, (schema, statuses) in schemas.items():
        yield Case(f"schema: {name}", CHAT, form(schema), statuses)
    formats: dict[str, Any] = {
        "unknown": {"type": "yaml"},
        "without schema": {"type": "json_schema"},
        "bad name": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        "broken regex": {"type": "regex", "regex": "["},
        "look-ahead": {"type": "regex", "regex": "(?=a)b"},
        "empty regex": {"type": "regex", "regex": ""},
        "no choices": {"type": "choice", "choices": []},
        "broken grammar": {"type": "grammar", "grammar": "start: ("},
        "no start": {"type": "grammar", "grammar": 'other: "x"'},
        "unknown rule": {"type": "grammar", "grammar": "start: nowhere"},
        "token that does not exist": {"type": "grammar", "grammar": "start: <[99999]>"},
    }
    for name, value in formats.items():
        yield Case(f"format: {name}", CHAT, chat(response_format=value))
    recursion = {"type": "grammar", "grammar": "start: start start"}
    control = {"type": "grammar", "grammar": "start: <[3]>"}
    yield Case("format: endless grammar", CHAT, chat(response_format=recursion), (200, 400))
    yield Case("format: control token", CHAT, chat(response_format=control), (400,))


def _tools() -> Iterator[Case]:
    def tool(**change: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", **change}}

    tools: dict[str, Any] = {
        "a string": "f",
        "no type": [{"function": {"name": "f"}}],
        "no function": [{"type": "function"}],
        "no name": [{"type": "function", "function": {}}],
        "long name": [tool(name="f" * 513)],
        "empty name": [tool(name="")],
        "same name": [tool(), tool()],
        "too many": [tool(name=f"f{i}") for i in range(300)],
        "parameters as string": [tool(parameters="x")],
        "parameters of another type": [tool(parameters={"type": "banana"}, strict=True)],
        "strict and inexpressible": [tool(parameters={"type": "object", "not": {}}, strict=True)],
        "web search": [{"type": "web_search"}],
    }
    for name, value in tools.items():
        yield Case(f"tools: {name}", CHAT, chat(tools=value))
    for odd in ("[INST]", "f" * 512, "a\0b\n", "\u202e"):
        yield Case(f"tool called {odd[:9]!r}", CHAT, chat(tools=[tool(name=odd)]), (200,))
    choices: dict[str, Any] = {
        "unknown word": "maybe",
        "unknown tool": {"type": "function", "function": {"name": "g"}},
        "no name": {"type": "function"},
        "list": ["f"],
    }
    for name, value in choices.items():
        yield Case(f"tool choice: {name}", CHAT, chat(tools=[tool()], tool_choice=value))


def _png(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + chunk + end


def grain(width: int, height: int, *, is_black: bool = False) -> bytes:
    """A PNG of so many pixels: dark noise of little depth, or nothing at all in a small file."""
    raw = bytes(width * height * 3)
    if not is_black:
        raw = bytes(value & 3 for value in random.Random(0).randbytes(len(raw)))
    lines = b"".join(b"\0" + raw[i : i + 3 * width] for i in range(0, len(raw), 3 * width))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _images() -> Iterator[Case]:
    urls: dict[str, Any] = {
        "file": "file:///etc/passwd",
        "path": "/etc/passwd",
        "loopback": "http://127.0.0.1:1/x.png",
        "metadata": "http://169.254.169.254/latest/meta-data/",
        "name": "http://localhost/x.png",
        "ftp": "ftp://example.com/x.png",
        "empty": "",
        "number": 5,
        "no data": "data:",
        "no comma": "data:image/png;base64",
        "bad base64": "data:image/png;base64,????",
        "text": "data:image/png;base64," + base64.b64encode(b"hello").decode(),
        "svg": "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>",
        "promised size": "data:;base64," + base64.b64encode(_png(50_000, 50_000)).decode(),
        "zero size": "data:;base64," + base64.b64encode(_png(0, 10)).decode(),
        "no pixels": "data:;base64," + base64.b64encode(_png(10, 10)).decode(),
    }
    for name, url in urls.items():
        part = {"type": "image_url", "image_url": {"url": url}}
        yield Case(f"image: {name}", CHAT, said([part]))
        if isinstance(url, str):
            item = {"type": "input_image", "image_url": url}
            body = {"model": "tiny", "input": [{"role": "user", "content": [item]}]}
            yield Case(f"image: {name} in a response", RESPONSES, body)


def _prompts() -> Iterator[Case]:
    prompts: dict[str, Any] = {
        "absent": None,
        "empty list": [],
        "nested empty": [[]],
        "mixed": ["a", 1],
        "mixed the other way": [1, "a"],
        "negative": [-1],
        "too large": [10**6],
        "image token": [1, 10],
        "floats": [1.5],
        "three levels": [[[1]]],
        "too many": ["a"] * 1000,
        "object": {"a": 1},
    }
    for name, prompt in prompts.items():
        yield Case(f"prompt: {name}", TEXT, {"model": "tiny", "prompt": prompt, "max_tokens": 1})
    yield Case("detokenize: negative", "/detokenize", {"tokens": [-1]})
    yield Case("detokenize: strings", "/detokenize", {"tokens": ["a"]})
    yield Case(
        "responses: stored", RESPONSES, {"model": "tiny", "input": "x", "previous_response_id": "y"}
    )
    yield Case("responses: items", RESPONSES, {"model": "tiny", "input": [{"type": "mcp_call"}]})


def _http() -> Iterator[Case]:
    for path in ("/v1", "/v1/chat", "/admin", "/web/../app.py", "/web/%2e%2e%2fapp.py", "/%2f"):
        yield Case(f"path: {path}", path, b"", (404, 405), "GET")
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        yield Case(f"method: {method}", CHAT, b"", (405,), method)
    yield Case(
        "type: text",
        CHAT,
        json.dumps(chat()).encode(),
        (200,),
        headers=(("Content-Type", "text/plain"),),
    )
    yield Case(
        "header: long", CHAT, chat(), (200, 400, 431), headers=(("X-Request-Id", "a" * 5000),)
    )
    yield Case("header: odd id", CHAT, chat(), (200,), headers=(("X-Request-Id", "a b\tc"),))
    yield Case("body: too large", CHAT, b" " * 2_000_001, (413,))


# --- heavy ones: what they cost others is measured over a server process ---------------------


class Heavy(NamedTuple):
    """A request that must cost little; `content` makes its body, `times` of them go at once."""

    name: str
    path: str
    content: Callable[[], bytes]
    statuses: tuple[int, ...] = (400,)
    times: int = 1
    is_brief: bool = False


_PICTURE = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,'


def messages(value: bytes) -> bytes:
    """The body of a chat with these messages."""
    return b'{"model":"m","max_tokens":2,"messages":' + value + b"}"


def seen(*pictures: bytes) -> bytes:
    """The body of a chat that shows these pictures, files of any format."""
    parts = [_PICTURE + base64.b64encode(one) + b'"}}' for one in pictures]
    return messages(b'[{"role":"user","content":[' + b",".join(parts) + b"]}]")


def heavy() -> list[Heavy]:
    """Megabytes of structure, text, ids, pixels; brief ones are few enough for every run."""
    hello = json.dumps(HELLO).encode()

    def chat_with(field: bytes) -> bytes:
        return b'{"model": "m", "max_tokens": 2, "messages": ' + hello + b", " + field + b"}"

    def many(value: bytes, count: int, start: bytes = b"[", end: bytes = b"]") -> bytes:
        return start + b",".join([value] * count) + end

    def names(count: int) -> bytes:
        return b"{" + b",".join(b'"k%d":1' % i for i in range(count)) + b"}"

    def saying(text: bytes) -> bytes:
        return (
            b'{"model":"m","max_tokens":2,"messages":[{"role":"user","content":"' + text + b'"}]}'
        )

    def one(text: str, size: int) -> Callable[[], bytes]:
        return lambda: saying((text * (size // len(text))).encode())

    def chained(count: int) -> bytes:
        """A schema whose definitions refer to each other, one after the other."""
        defs: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
        schema = {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{count}": {"type": "string"}}}
        inner = {"name": "x", "schema": schema, "strict": True}
        form = {"type": "json_schema", "json_schema": inner}
        return json.dumps({**chat(response_format=form), "model": "m"}).encode()

    big = 31_000_000
    user = b'{"role":"user","content":"x"}'
    part = b'{"type":"text","text":""}'
    four_times_1000 = many(b'{"role":"user","content":' + many(part, 1000) + b"}", 4)
    regex = {"type": "regex", "regex": "(a{900}){90}"}

    def ids(path: str, name: str, count: int, **options: Any) -> Heavy:
        field = name.encode()
        return Heavy(
            f"{count} {name}",
            path,
            lambda: b'{"model":"m","%s":%s}' % (field, many(b"5", count)),
            **options,
        )

    def in_chat(what: str, field: str, value: Callable[[], bytes], **options: Any) -> Heavy:
        return Heavy(what, CHAT, lambda: chat_with(b'"%s":' % field.encode() + value()), **options)

    found = [
        in_chat("stop ids", "stop_token_ids", lambda: many(b"5", 590_000)),
        in_chat("stop ids beyond", "stop_token_ids", lambda: many(b"5", 5_000_000)),
        in_chat("body beyond", "stop_token_ids", lambda: many(b"5", 17_000_000), statuses=(413,)),
        in_chat("bias", "logit_bias", lambda: names(59_000)),
        in_chat("names", "metadata", lambda: names(59_000), statuses=(200,)),
        in_chat("names beyond", "metadata", lambda: names(400_000)),
        in_chat("numbers", "metadata", lambda: many(b"1.5", 290_000), statuses=(200,)),
        in_chat("numbers beyond", "metadata", lambda: many(b"1.5", 590_000)),
        in_chat("long numbers", "metadata", lambda: many(b"9" * 4000, 7000)),
        Heavy("empty messages", CHAT, lambda: messages(many(b"{}", 49_000)), is_brief=True),
        Heavy("messages", CHAT, lambda: messages(many(user, 49_000))),
        Heavy("parts", CHAT, lambda: messages(many(part, 49_000))),
        Heavy("parts of some", CHAT, lambda: messages(four_times_1000), (200, 400), times=4),
        Heavy("items", RESPONSES, lambda: b'{"model":"m","input":' + many(user, 4000) + b"}",
              (200, 400), times=2),
        ids("/detokenize", "tokens", 590_000, is_brief=True),
        ids("/detokenize", "tokens", 290_000),
        ids("/detokenize", "tokens", 4000, statuses=(200, 429), times=200),
        ids(TEXT, "prompt", 590_000),
        Heavy("prompts", TEXT, lambda: b'{"model":"m","prompt":' + many(b'"a"', 190_000) + b"}"),
        Heavy("text", CHAT, one("ab ", 10_000_000), times=8),
        Heavy("large text", CHAT, one("ab ", big)),
        Heavy("text beyond ASCII", CHAT, one("é", big // 2), is_brief=True),
        Heavy("escaped text", CHAT, lambda: saying(b"\\u00e9" * (big // 6))),
        Heavy("escaped lines", CHAT, lambda: saying(b"\\n" * (big // 2))),
        Heavy("text of blanks", CHAT, one(" ", 10_000_000)),
        Heavy("text of one letter", CHAT, one("a", 60_000), (200, 400), times=16, is_brief=True),
        Heavy("text of a million letters", CHAT, one("a", 1_000_000)),
        Heavy("text near the context", CHAT, one("word ", 60_000), (200, 400), times=40),
        Heavy("text to tokenize", "/tokenize", lambda: b'{"prompt":"' + b"ab " * 10_000 + b'"}',
              (200, 400, 429), times=300),
        Heavy("plain text", TEXT, lambda: b'{"model":"m","prompt":"' + b"ab " * 3_000_000 + b'"}',
              times=4),
        Heavy("picture that is none", CHAT, lambda: messages(
              b'[{"role":"user","content":[' + _PICTURE + b"QUJD" * (big // 4 - 100) + b'"}}]}]')),
        Heavy("a picture", CHAT, lambda: seen(grain(560, 560)), (200,), is_brief=True),
        Heavy("a picture of full size", CHAT, lambda: seen(grain(1540, 1540)), (200,)),
        Heavy("pictures of full size at once", CHAT, lambda: seen(grain(1540, 1540)), (200,),
              times=3),
        Heavy("pictures in a request", CHAT, lambda: seen(*[grain(700, 700)] * 5), (200,)),
        Heavy("chained schema", CHAT, lambda: chained(60), (200, 400)),
        Heavy("counted regex", CHAT,
              lambda: json.dumps({**chat(response_format=regex), "model": "m"}).encode(),
              (200, 400)),
    ]  # fmt: skip
    assert len({case.name for case in found}) == len(found)
    return found
