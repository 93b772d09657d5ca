"""Small tokenizer files of each generation that Mistral's models have shipped."""

import json
import shutil
from pathlib import Path
from typing import Any

TEKKEN = Path(__file__).parent / "data" / "chat" / "tekken" / "tekken.json"
# Which file a model of each generation has: v3 Nemo and Pixtral 12B, v7 Small 3 and Devstral 1, v11
# Small 3.2, v13 Magistral, Ministral 3 and Devstral 2, v15 Medium 3.5.
VERSIONS = ("v3", "v7", "v11", "v13", "v15")
# Control tokens that a version does not know yet.
_LATER = {
    "v3": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]"),
    "v7": ("[ARGS]", "[CALL_ID]"),
}
_THOUGHTS = ("[THINK]", "[/THINK]")
_SETTINGS = ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")


def write_tekken(directory: Path, version: str, *, images: bool = True) -> None:
    """A tekken.json of one version, of 764 tokens, in an existing directory."""
    value: dict[str, Any] = json.loads(TEKKEN.read_text())
    value["config"]["version"] = version
    unknown = set(_LATER.get(version, ()))
    if version not in ("v13", "v15"):
        unknown |= {*_THOUGHTS}
    if version != "v15":
        unknown |= {*_SETTINGS}
        del value["model_settings_builder"]
    for token in value["special_tokens"]:
        if token["token_str"] in unknown:
            token["token_str"] = f"<SPECIAL_{token['rank']}>"
    if not images:
        del value["image"]
    elif version == "v3":
        # Pixtral 12B merges no patches.
        value["image"] = {"image_patch_size": 16, "max_image_size": 1024}
    (directory / "tekken.json").write_text(json.dumps(value, ensure_ascii=False))


def write_tokenizer(directory: Path, kind: str, *, images: bool) -> None:
    """The tokenizer files of a kind, `tekken-VERSION` or `spm-v3`, in an existing directory."""
    if kind == "spm-v3":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TEKKEN.parent.parent / "spm-v3" / name, directory)
        return
    write_tekken(directory, kind.removeprefix("tekken-"), images=images)
