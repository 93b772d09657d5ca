"""Writes `made_up/bfcl/`: own items and services in the layout of the wheel bfcl-eval.

A few rows of each category, so that tool calls can be asked and graded anywhere. They measure
nothing. The two services beside them (`func_source_code/`) are written by hand.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "made_up" / "bfcl" / "bfcl_eval" / "data"

Row = dict[str, Any]


def document(name: str, description: str, required: list[str], **properties: Row) -> Row:
    parameters = {"type": "dict", "properties": properties, "required": required}
    return {"name": name, "description": description, "parameters": parameters}


BREW = document(
    "kitchen.brew",
    "Brew a hot drink.",
    ["drink"],
    drink={"type": "string", "description": "What to brew."},
    cups={"type": "integer", "description": "How many cups.", "default": 1},
    strength={"type": "float", "description": "From 0 to 1."},
)
PAINT = document(
    "paint_fence",
    "Paint a fence.",
    ["colours", "size"],
    colours={"type": "array", "items": {"type": "string"}, "description": "In order."},
    size={
        "type": "dict",
        "description": "In metres.",
        "properties": {
            "height": {"type": "float", "description": "How high."},
            "length": {"type": "integer", "description": "How long."},
        },
    },
    twice={"type": "boolean", "description": "Whether to paint it twice."},
)
ROUTE = document(
    "plan_route",
    "Plan a walk.",
    ["start", "stops"],
    start={"type": "tuple", "items": {"type": "float"}, "description": "Longitude and latitude."},
    stops={
        "type": "array",
        "items": {"type": "dict", "properties": {"name": {"type": "string"}}},
        "description": "Where to rest.",
    },
    note={"type": "any", "description": "Anything else."},
)
TEA = {"kitchen.brew": {"drink": ["green tea", "tea, green"], "cups": [2], "strength": ["", 0.5]}}
COFFEE = {"kitchen.brew": {"drink": ["coffee"], "cups": ["", 1], "strength": ["", 0.5]}}
FENCE = {
    "paint_fence": {
        "colours": [["red", "dark blue"]],
        "size": [{"height": [1.5], "length": [20, 21]}],
        "twice": ["", False],
    }
}
WALK = {
    "plan_route": {
        "start": [[7.5, 47.6]],
        "stops": [[{"name": ["Old Mill"]}, {"name": ["Lake", "lake shore"]}]],
        "note": ["", "slowly"],
    }
}
SINGLE: dict[str, list[tuple[str, list[Row], list[Row] | None]]] = {
    "simple": [
        ("Brew two cups of green tea.", [BREW], [TEA]),
        ("Paint a fence of 1.5 by 20 metres red and dark blue.", [PAINT], [FENCE]),
        ("Plan a walk from 7.5, 47.6 by the old mill to the lake.", [ROUTE], [WALK]),
    ],
    "multiple": [("I would like a coffee, please.", [PAINT, BREW], [COFFEE])],
    "parallel": [("Two green teas and then a coffee.", [BREW], [TEA, COFFEE])],
    "parallel_multiple": [("A coffee, and paint my fence.", [PAINT, BREW], [FENCE, COFFEE])],
    "irrelevance": [("Who wrote the letters of Seneca?", [BREW], None)],
    "relevance": [("Something hot to drink would be nice.", [BREW], None)],
}
NUMBER = {"type": "integer", "description": "Its number."}
TICKETS = [
    document(
        "open_ticket",
        "Open a ticket.",
        ["title"],
        title={"type": "string", "description": "What it is about."},
        urgency={"type": "integer", "description": "From 1 to 5.", "default": 1},
    ),
    document("close_ticket", "Close a ticket.", ["number"], number=NUMBER),
    document("list_tickets", "The numbers of open tickets.", []),
]
SUM = document(
    "sum_values",
    "Add numbers.",
    ["numbers"],
    numbers={"type": "array", "items": {"type": "float"}, "description": "What to add."},
)


def say(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def write(name: str, rows: list[Row]) -> None:
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_single() -> None:
    for prefix in ("", "live_"):
        for kind, rows in SINGLE.items():
            if kind == "relevance" and not prefix:
                continue
            name = "simple_python" if kind == "simple" and not prefix else prefix + kind
            ids = [f"{name}_{n}" + ("-0-0" if prefix else "") for n in range(len(rows))]
            asked = [
                {"id": i, "question": [say(q)], "function": d}
                for i, (q, d, _) in zip(ids, rows, strict=True)
            ]
            write(f"BFCL_v4_{name}.json", asked)
            right = [
                {"id": i, "ground_truth": a}
                for i, (_, _, a) in zip(ids, rows, strict=True)
                if a is not None
            ]
            if right:
                write(f"possible_answer/BFCL_v4_{name}.json", right)


def write_multi_turn() -> None:
    write("multi_turn_func_doc/ticket_api.json", TICKETS)
    write("multi_turn_func_doc/math_api.json", [SUM])
    opening, closing = "open_ticket(title='Leak', urgency=3)", "close_ticket(7)"
    turns: dict[str, list[tuple[list[Row], list[str]]]] = {
        "base": [
            (say("Open an urgent ticket (3) about a leak."), [opening]),
            (say("Close ticket 7 and add 1.5 and 2."), [closing, "sum_values(numbers=[1.5, 2])"]),
        ],
        "miss_func": [
            (say("Open an urgent ticket (3) about a leak."), [opening]),
            (say("Close ticket 7."), []),
            ([], [closing]),
        ],
        "miss_param": [
            (say("Open a ticket about a leak."), []),
            (say("Urgency 3. And which tickets are open then?"), [opening, "list_tickets()"]),
        ],
        "long_context": [(say("Which tickets are open?"), ["list_tickets()"])],
    }
    for kind, steps in turns.items():
        row = {
            "id": f"multi_turn_{kind}_0",
            "question": [said for said, _ in steps],
            "initial_config": {"TicketAPI": {"open": [7, 8], "next_number": 9}},
            "path": [],
            "involved_classes": ["TicketAPI", "MathAPI"],
        }
        if kind == "miss_func":
            row["missed_function"] = {"2": ["close_ticket"]}
        write(f"BFCL_v4_multi_turn_{kind}.json", [row])
        truth = {"id": row["id"], "ground_truth": [calls for _, calls in steps]}
        write(f"possible_answer/BFCL_v4_multi_turn_{kind}.json", [truth])


def write_ungraded() -> None:
    """Rows that calibration may see, and among them three that repeat graded questions."""
    java = [
        {"id": "simple_java_0", "question": [say("Sort the shelf by colour.")], "function": [PAINT]}
    ]
    write("BFCL_v4_simple_java.json", java)
    write(
        "unused_datasets/question/BFCL_v4_chatable.json",
        [
            {"question": "Brew two cups of green tea!", "function": ""},
            {"question": "Tell me of the history of tea.", "function": ""},
        ],
    )
    rest = [
        {"id": "rest_0", "question": [say("Sort the shelf, by colour.")], "function": [PAINT]},
        {"id": "rest_1", "question": [say("Which walks are open now?")], "function": [ROUTE]},
    ]
    write("unused_datasets/question/BFCL_v4_rest.json", rest)
    sql: list[Row] = [
        {
            "id": "sql_0",
            "question": say("Urgency 3; and which tickets are open then?"),
            "function": [SUM],
        },
        {"id": "sql_1", "question": say("How many rows has the table?"), "function": SUM},
    ]
    write("unused_datasets/question/BFCL_v4_sql.json", sql)


if __name__ == "__main__":
    write_single()
    write_multi_turn()
    write_ungraded()
