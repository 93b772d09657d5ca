"""The tokenizer: the first ranks of the Tekken vocabulary that mistral-common ships, version 15.

A prefix of byte-pair ranks is a valid vocabulary, every byte is a token, and the official ids of
the control tokens are kept. `write_tekken` needs mistral-common; reading needs only tiktoken.
"""

import base64
import json
from importlib.resources import files
from pathlib import Path

import tiktoken

NUM_SPECIAL, VOCAB_SIZE = 64, 4096
MAX_IMAGE_SIDE = 448
CONTROL = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]", 7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]",
    10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]", 13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]",
    16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]",
    32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]", 36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}  # fmt: skip


def write_tekken(path: Path) -> None:
    """Write the model's tekken.json."""
    package = files("mistral_common").joinpath("data/tekken_240911.json")
    source = json.loads(package.read_text(encoding="utf-8"))
    ranks = VOCAB_SIZE - NUM_SPECIAL
    made = {
        "config": {
            **source["config"],
            "num_vocab_tokens": ranks,
            "default_vocab_size": VOCAB_SIZE,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": "v15",
        },
        "vocab": source["vocab"][:ranks],
        "special_tokens": [
            {"rank": i, "token_str": CONTROL.get(i, f"<SPECIAL_{i}>"), "is_control": True}
            for i in range(NUM_SPECIAL)
        ],
        "image": {
            "image_patch_size": 14,
            "max_image_size": MAX_IMAGE_SIDE,
            "spatial_merge_size": 2,
        },
        "model_settings_builder": {
            "reasoning_effort": {
                "type": "enum",
                "accepts_none": True,
                "default": "none",
                "values": ["none", "high"],
            },
            "json_schema": {"type": "json_schema", "accepts_none": False, "default": None},
        },
    }
    path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


class Vocabulary:
    """Text to ids, and the ids of control tokens by name."""

    def __init__(self, tekken: Path) -> None:
        self.path = tekken
        fields = json.loads(tekken.read_text(encoding="utf-8"))
        special = fields["config"]["default_num_special_tokens"]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in fields["vocab"]}
        self._bytes = [b""] * special + sorted(ranks, key=ranks.__getitem__)
        self._encoding = tiktoken.Encoding(
            "pocket", pat_str=fields["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
        )
        self._special = special
        self.control = {entry["token_str"]: entry["rank"] for entry in fields["special_tokens"]}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, which never holds a control token."""
        return [rank + self._special for rank in self._encoding.encode_ordinary(text)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens are left out."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")
