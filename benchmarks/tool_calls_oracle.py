"""The leaderboard's own checker over answers from standard input; run by tool_calls_agreement.py.

Needs bfcl-eval and nothing of this project: it runs under an interpreter that has it installed.
One line of JSON in, one out: `null` where the answer is right, else what the checker calls the
error; "crash: ..." where the checker itself fails. A line without an answer asks for a hash of the
item's first request as the leaderboard sends it to Mistral, less what functions return.
"""

import copy
import hashlib
import io
import json
import os
import sys
from contextlib import redirect_stdout
from typing import Any

# Any name of its list that calls tools by the protocol and replaces dots in names.
MODEL = "gpt-4o-2024-11-20-FC"


def main() -> None:
    os.environ.setdefault("OPENAI_API_KEY", "none")
    # mypy: bfcl-eval is installed in another environment only.
    from bfcl_eval.constants.enums import (  # type: ignore[import-not-found]
        Language,
        ModelStyle,
        ReturnFormat,
    )
    from bfcl_eval.constants.model_config import (  # type: ignore[import-not-found]
        MODEL_CONFIG_MAPPING,
    )
    from bfcl_eval.constants.type_mappings import (  # type: ignore[import-not-found]
        GORILLA_TO_OPENAPI,
    )
    from bfcl_eval.eval_checker import eval_runner  # type: ignore[import-not-found]
    from bfcl_eval.eval_checker.multi_turn_eval import (  # type: ignore[import-not-found]
        multi_turn_utils,
    )
    from bfcl_eval.model_handler.utils import convert_to_tool  # type: ignore[import-not-found]
    from bfcl_eval.utils import (  # type: ignore[import-not-found]
        load_dataset_entry,
        load_ground_truth_entry,
    )

    model = MODEL if MODEL in MODEL_CONFIG_MAPPING else _any_model(MODEL_CONFIG_MAPPING)
    handler = eval_runner.get_handler(model)
    sets: dict[str, tuple[list[Any], list[Any]]] = {}

    requests: dict[str, list[Any]] = {}

    def tools_of(functions: list[Any]) -> list[Any]:
        tools = convert_to_tool(functions, GORILLA_TO_OPENAPI, ModelStyle.MISTRAL)
        for tool in tools:
            tool["function"].pop("response", None)
        return list(tools)

    def request_hash(category: str, index: int) -> str:
        if category not in requests:
            requests[category] = load_dataset_entry(category)
        row = requests[category][index]
        later = {turn: tools_of(found) for turn, found in row.get("missed_function", {}).items()}
        sent = [row["question"][0], tools_of(row["function"]), later]
        return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()

    def verdict(task: dict[str, Any], number: int) -> str | None:
        if "said" not in task:
            return request_hash(task["category"], task["index"])
        category, index, said = task["category"], task["index"], task["said"]
        if category not in sets:
            rows = load_dataset_entry(
                category, include_prereq=False, include_language_specific_hint=False
            )
            stated = "relevance" not in category
            sets[category] = (rows, load_ground_truth_entry(category) if stated else [])
        rows, answers = sets[category]
        row = copy.deepcopy(rows[index])
        if "relevance" in category:
            found = eval_runner._evaluate_single_relevance_entry(
                handler, row["id"], said, row, model, category
            )
        elif category.startswith("multi_turn"):
            # Services are kept by model and item: another name for every answer.
            name = f"model{number}x"
            found = eval_runner._evaluate_single_multi_turn_entry(
                handler, row["id"], said, answers[index]["ground_truth"], row, name, category
            )
            for kept in [k for k in vars(multi_turn_utils) if k.startswith(name)]:
                delattr(multi_turn_utils, kept)
        else:
            found = eval_runner._evaluate_single_ast_entry(
                handler, row["id"], said, answers[index]["ground_truth"], row, model, category,
                Language.PYTHON, ReturnFormat.PYTHON,
            )  # fmt: skip
        if found["valid"]:
            return None
        error = found.get("error")
        kind = error.get("error_type") if isinstance(error, dict) else found.get("error_type")
        return str(kind)

    for number, line in enumerate(sys.stdin):
        with redirect_stdout(io.StringIO()):
            try:
                said = verdict(json.loads(line), number)
            except Exception as failure:
                said = f"crash: {type(failure).__name__}: {failure}"
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def _any_model(models: dict[str, Any]) -> str:
    return next(name for name, m in models.items() if m.is_fc_model and m.underscore_to_dot)


if __name__ == "__main__":
    main()
