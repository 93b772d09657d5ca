"""The data of the Berkeley Function Calling Leaderboard, read where a user has it.

Its wheel `bfcl-eval` (Apache-2.0) holds prompts, documents of functions, possible answers and the
simulated services of its conversations. Nothing of it is part of this package. `evals` asks and
grades what the leaderboard grades; `calibrate` may draw from the rest, never from what is graded.
Rules: docs/reference/tool-calls.md.
"""

import copy
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError, in_words

DISTRIBUTION = "bfcl-eval"
HOW = (
    "`pip download bfcl-eval --no-deps` brings the wheel: put it, or a folder that it was unpacked "
    "into, in bfcl/ below --data, or install it with `pip install --no-deps bfcl-eval`"
)

NON_LIVE = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = (
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
MULTI_TURN = (
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
)
GRADED = (*NON_LIVE, *LIVE, *MULTI_TURN)
# No right call is stated for these: what counts is whether there is one.
WITHOUT_ANSWER = ("irrelevance", "live_irrelevance", "live_relevance")

# A class of the simulated services -> the file that documents it, and the one that is it.
SERVICES: Mapping[str, str] = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
# The long texts and lists that several services add in the category of long contexts.
SHARED_SOURCE = "long_context"

# Categories that the leaderboard grades and no benchmark here asks.
GRADED_ELSEWHERE = ("simple_java", "simple_javascript", "memory", "web_search")

# Files whose rows the leaderboard grades no longer, or never did. Each row is still compared with
# what is graded: nearly all of `chatable` repeats graded questions.
UNGRADED = tuple(
    f"unused_datasets/question/BFCL_v4_{name}.json"
    for name in (
        "chatable",
        "exec_multiple",
        "exec_parallel",
        "exec_parallel_multiple",
        "exec_simple",
        "rest",
        "sql",
    )
)

# What the leaderboard calls a type -> what JSON Schema does.
_SCHEMA_TYPES = {
    "integer": "integer",
    "number": "number",
    "float": "number",
    "string": "string",
    "boolean": "boolean",
    "bool": "boolean",
    "array": "array",
    "list": "array",
    "dict": "object",
    "object": "object",
    "tuple": "array",
    "any": "string",
    "byte": "integer",
    "short": "integer",
    "long": "integer",
    "double": "number",
    "char": "string",
    "ArrayList": "array",
    "Array": "array",
    "HashMap": "object",
    "Hashtable": "object",
    "Queue": "array",
    "Stack": "array",
    "Any": "string",
    "String": "string",
    "Bigint": "integer",
}
_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Where the data lies, in a wheel or a folder.

    data    holds `BFCL_v4_*.json`
    code    holds the modules of the simulated services; None where only data is at hand
    source  how records name it
    note    what a NOTE.txt beside the files says of them, such as that they are made up
    """

    data: Traversable
    code: Traversable | None
    source: str
    note: str = ""

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a file below `data`, one JSON object a line.

        Raises UsageError if it is not there or is damaged.
        """
        found: list[dict[str, Any]] = []
        for number, line in enumerate(self._text(name).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as failure:
                raise UsageError(
                    f"{self.source}: {name}, line {number} is not JSON: {in_words(failure)}"
                ) from failure
            if not isinstance(row, dict):
                raise UsageError(f"{self.source}: {name}, line {number}: an object was expected")
            found.append(row)
        return found

    def has(self, name: str) -> bool:
        """Whether there is a file of this name below `data`."""
        return _below(self.data, name).is_file()

    def questions(self, category: str) -> list[dict[str, Any]]:
        """The rows that a category asks, in the order of its file."""
        return self.rows(f"BFCL_v4_{category}.json")

    def answers(self, category: str) -> list[dict[str, Any]]:
        """What is right for each row of a category that states it, in the order of its rows."""
        return self.rows(f"possible_answer/BFCL_v4_{category}.json")

    def documents(self, service: str) -> list[dict[str, Any]]:
        """The documents of all functions that a simulated service offers."""
        return self.rows(f"multi_turn_func_doc/{SERVICES[service]}.json")

    def module(self, stem: str) -> str:
        """Source text of a simulated service; read as text, never imported by this process.

        Raises UsageError if only data is at hand.
        """
        if self.code is None:
            raise UsageError(
                f"{self.source} has the data but not the simulated services that its conversations "
                f"call. {HOW}"
            )
        return _read(self.code.joinpath(f"{stem}.py"), self.source)

    def sha256(self, name: str) -> str:
        """Hash of a file below `data`, in hexadecimal."""
        return hashlib.sha256(self._text(name).encode()).hexdigest()

    def _text(self, name: str) -> str:
        return _read(_below(self.data, name), self.source)


def _below(folder: Traversable, name: str) -> Traversable:
    for part in name.split("/"):
        folder = folder.joinpath(part)
    return folder


def _read(file: Traversable, source: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, KeyError, ValueError) as failure:
        raise UsageError(f"{source}: {file.name} cannot be read: {in_words(failure)}") from failure


def find_leaderboard(data: Path | None) -> Leaderboard:
    """The leaderboard's data below a folder of the user's, or as installed.

    data  the wheel; a folder that holds it, by itself or in bfcl/; a folder it was unpacked into;
          or None
    Raises UsageError, with what to do, if it is nowhere.
    """
    if data is not None:
        for place in (data, data / "bfcl"):
            if (found := _at(place)) is not None:
                return replace(found, note=_note(place))
    if (found := _installed()) is not None:
        return found
    looked = f"{data}/bfcl" if data is not None else "no --data folder given"
    raise UsageError(f"Tool calls: the leaderboard's data was not found ({looked}). {HOW}")


def _note(place: Path) -> str:
    notes = [path for path in (place / "NOTE.txt", place.parent / "NOTE.txt") if path.is_file()]
    return notes[0].read_text(encoding="utf-8").strip() if notes else ""


def _at(place: Path) -> Leaderboard | None:
    if place.is_file() and place.suffix == ".whl":
        return _in_wheel(place)
    if not place.is_dir():
        return None
    if wheels := sorted(place.glob("bfcl_eval-*.whl")):
        return _in_wheel(wheels[-1])
    for package in (place / "bfcl_eval", place):
        if (found := _in_package(package, f"{place.parent.name}/{place.name}")) is not None:
            return found
    if (place / "BFCL_v4_simple_python.json").is_file():
        beside = _services(place.parent) if place.name == "data" else None
        return Leaderboard(place, beside, f"{place.parent.name}/{place.name}")
    return None


def _in_wheel(wheel: Path) -> Leaderboard:
    try:
        root = zipfile.Path(wheel)
        found = _in_package(root / "bfcl_eval", wheel.name)
    except (OSError, zipfile.BadZipFile) as failure:
        raise UsageError(f"{wheel} is not a wheel: {in_words(failure)}") from failure
    if found is None:
        raise UsageError(f"{wheel} does not hold bfcl_eval/data. {HOW}")
    return found


def _in_package(package: Traversable, source: str) -> Leaderboard | None:
    data = package.joinpath("data")
    if not data.joinpath("BFCL_v4_simple_python.json").is_file():
        return None
    return Leaderboard(data, _services(package), source)


def _services(package: Traversable) -> Traversable | None:
    folder = _below(package, "eval_checker/multi_turn_eval/func_source_code")
    return folder if folder.joinpath("math_api.py").is_file() else None


def _installed() -> Leaderboard | None:
    try:
        found = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return None
    package = Path(str(found.locate_file("bfcl_eval")))
    return _in_package(package, f"{DISTRIBUTION} {found.version}")


def wire_name(name: str) -> str:
    """A function's name as it may be sent: dots, which the protocol does not allow, become `_`."""
    return name.replace(".", "_")


def as_tool(document: Mapping[str, Any]) -> dict[str, Any]:
    """A function's document as a tool of the protocol, its types those of JSON Schema.

    What the function returns (`response`) is left out: the protocol has no such field.
    """
    parameters = copy.deepcopy(dict(document["parameters"]))
    parameters["type"] = "object"
    parameters["properties"] = _as_schemas(parameters.get("properties") or {})
    return {
        "type": "function",
        "function": {
            "name": wire_name(document["name"]),
            "description": document["description"],
            "parameters": parameters,
        },
    }


def _as_schemas(properties: dict[str, Any]) -> dict[str, Any]:
    return {name: _as_schema(details) for name, details in properties.items()}


def _as_schema(details: dict[str, Any]) -> dict[str, Any]:
    """One parameter; of a list's items three levels are looked at, as deep as documents go."""
    stated = details.get("type")
    if stated == "float":
        details["format"] = "float"
        details["description"] = details.get("description", "") + " This is a float type value."
    details["type"] = _schema_type(stated)
    if details["type"] in ("array", "object"):
        if "properties" in details:
            details["properties"] = _as_schemas(details["properties"])
        elif "items" in details:
            items = details["items"]
            items["type"] = _schema_type(items.get("type"))
            if items["type"] == "array" and "items" in items:
                items["items"]["type"] = _schema_type(items["items"].get("type"))
            elif items["type"] == "object" and "properties" in items:
                items["properties"] = _as_schemas(items["properties"])
    return details


def _schema_type(stated: Any) -> str:
    return _SCHEMA_TYPES.get(stated, "string") if isinstance(stated, str) else "string"


# --- what is graded, and what calibration may therefore not see


def _said(question: Any) -> Iterator[str]:
    """Every text that a user says in a row's question, whatever its nesting."""
    if isinstance(question, str):
        yield question
    elif isinstance(question, Mapping):
        if question.get("role", "user") == "user":
            yield str(question.get("content", ""))
    elif isinstance(question, Sequence):
        for part in question:
            yield from _said(part)


def text_hash(text: str) -> str:
    """Hash of a text by its letters and digits, so that a copy laid out otherwise is the same."""
    letters = "".join(c for c in text.casefold() if c.isalnum())
    return hashlib.sha256(letters.encode()).hexdigest()[:_DIGITS]


def question_hashes(row: Mapping[str, Any]) -> set[str]:
    """Hashes by which a row is recognised: of each thing that its user says.

    Words of nothing but courtesy are shared by many rows and tell nothing: texts below twelve
    letters and digits have no hash.
    """
    texts = (text for text in _said(row.get("question", ())))
    return {text_hash(text) for text in texts if sum(map(str.isalnum, text)) >= 12}


@cache
def graded_questions() -> frozenset[str]:
    """Hashes of all that is asked in the graded rows, as published; no text is kept."""
    text = (resources.files("halfbyte") / "bfcl_graded.json").read_text("utf-8")
    return frozenset(json.loads(text)["questions"])


@dataclass(frozen=True, slots=True)
class UngradedRows:
    """Rows that calibration may draw from, and how many were left out since they are graded.

    rows  messages and tools, in the form of a row of training data
    """

    rows: tuple[Mapping[str, Any], ...]
    graded: int


def ungraded_rows(leaderboard: Leaderboard) -> UngradedRows:
    """What users ask, and the functions that are offered, of rows that are not graded.

    A row is left out if anything that its user says is said in a graded row: of the published set,
    by hash, and of the files at hand, by themselves.
    """
    graded = set(graded_questions())
    for category in (*GRADED, *GRADED_ELSEWHERE):
        if leaderboard.has(f"BFCL_v4_{category}.json"):
            for row in leaderboard.questions(category):
                graded |= question_hashes(row)
    rows: list[Mapping[str, Any]] = []
    left_out = 0
    for name in UNGRADED:
        if not leaderboard.has(name):
            continue
        for number, row in enumerate(leaderboard.rows(name)):
            if question_hashes(row) & graded:
                left_out += 1
                continue
            rows.append(_as_training_row(row, f"{Path(name).stem}-{number}"))
    return UngradedRows(tuple(rows), left_out)


def _as_training_row(row: Mapping[str, Any], uuid: str) -> dict[str, Any]:
    question = row["question"]
    while isinstance(question, list) and question and isinstance(question[0], list):
        question = question[0]
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    documents = row.get("function") or []
    if isinstance(documents, Mapping):
        documents = [documents]
    return {"uuid": uuid, "messages": question, "tools": [as_tool(one) for one in documents]}


_PLACE = re.compile(r"_(\d+)(?:-(\d+)-\d+)?$")


def related(row_id: str, category: str) -> str:
    """The group of a row: rows of one group share a scenario, or the documents of functions.

    Examples: ``multi_turn_base_7`` and ``multi_turn_miss_func_7`` tell one story: they are of group
    ``multi_turn_7``. ``live_simple_19-3-15`` has the fourth document of its file and is of group
    ``live_simple/3``.
    """
    place = _PLACE.search(row_id)
    if category in MULTI_TURN and place is not None:
        return f"multi_turn_{place[1]}"
    if place is not None and place[2] is not None:
        return f"{category}/{place[2]}"
    return row_id
