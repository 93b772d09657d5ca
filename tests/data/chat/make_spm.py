"""Make spm-v3/: a small cut of the tokenizer of 32,768 tokens, and prompts of mistral-common by it.

Needs sentencepiece and protobuf, which nothing else here does; run again to reproduce the files.

tokenizer.json    control tokens, bytes, the first merges and ASCII of the model that mistral-common
                  ships, as the tokenizers library reads such models
prompts.json      conversations, and their ids by mistral-common over the same cut
"""

import importlib
import json
import string
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "spm-v3"
NAME = "mistral_instruct_tokenizer_240323.model.v3"
CONTROL = 40  # of 771
MERGED = 700

TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}"
    "{%- set turns = messages -%}{%- endif -%}"
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in turns -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{{- bos_token -}}"
    "{%- for m in turns -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if tools and loop.index0 == ns.last -%}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{{- '[INST] ' + (system if loop.index0 == ns.last else '') + m.content + '[/INST]' -}}"
    "{%- elif m.tool_calls -%}"
    "{{- '[TOOL_CALLS] [' -}}"
    "{%- for c in m.tool_calls -%}"
    "{{- '{\"name\": ' + (c.function.name | tojson) + ', \"arguments\": ' -}}"
    "{{- (c.function.arguments | tojson) + ', \"id\": ' + (c.id | tojson) + '}' -}}"
    "{{- '' if loop.last else ', ' -}}{%- endfor -%}{{- ']' + eos_token -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + (m.content | tojson) + ', \"call_id\": ' -}}"
    "{{- (m.tool_call_id | tojson) + '}[/TOOL_RESULTS]' -}}"
    "{%- endif -%}{%- endfor -%}"
)

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
CALL = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"word": "sea"}'},
}


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [said("user", "Hello")]},
    {"messages": [said("user", " two  spaces, a\ttab\nand a line ")]},
    {"messages": [said("user", "é 你好 😀 ▁ <0x41> [INST] </s>")]},
    {"messages": [said("system", "Be brief."), said("user", "What is the sea?")]},
    {
        "messages": [
            said("system", "Be brief."),
            said("user", "One"),
            said("assistant", "Two, of course."),
            said("user", "Three"),
        ]
    },
    {"messages": [said("user", "What does sea mean?")], "tools": [TOOL]},
    {
        "messages": [
            said("user", "What does sea mean?"),
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abc123def", "content": "much water"},
            said("assistant", "Much water."),
            said("user", "And lake?"),
        ],
        "tools": [TOOL],
    },
]


def cut(proto: Any) -> None:
    pieces = list(proto.pieces)
    normal, byte, control = 1, 6, 3
    kept = pieces[:3]
    kept += [one for one in pieces[3:] if one.type == control][:CONTROL]
    kept += [one for one in pieces if one.type == byte]
    kept += [one for one in pieces if one.type == normal and len(one.piece) > 1][:MERGED]
    chars = {*string.printable, "▁", "é"}
    kept += [one for one in pieces if one.type == normal and one.piece in chars]
    del proto.pieces[:]
    proto.pieces.extend(kept)


def tokenizer_json(proto: Any) -> dict[str, Any]:
    vocab = {one.piece: index for index, one in enumerate(proto.pieces)}
    merges = []
    for piece in sorted((one for one in proto.pieces if one.type == 1), key=lambda one: -one.score):
        text = piece.piece
        parts = [(text[:i], text[i:]) for i in range(1, len(text))]
        found = [pair for pair in parts if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    added = [
        {"id": index, "content": one.piece, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for index, one in enumerate(proto.pieces) if one.type in (2, 3)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                          "split": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "merges": [" ".join(pair) for pair in merges]},
    }  # fmt: skip


def main() -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = model.ModelProto()
    proto.ParseFromString(files("mistral_common").joinpath(f"data/{NAME}").read_bytes())
    cut(proto)
    HERE.mkdir(exist_ok=True)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
              "chat_template": TEMPLATE}  # fmt: skip
    for name, value in (("tokenizer", tokenizer_json(proto)), ("tokenizer_config", config)):
        text = json.dumps(value, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.model.v3"
        path.write_bytes(proto.SerializeToString())
        theirs = MistralTokenizer.from_file(str(path))
        plain = theirs.instruct_tokenizer.tokenizer
        prompts = [
            {**body, "ids": theirs.encode_chat_completion(
                ChatCompletionRequest.from_openai(**body)).tokens}
            for body in CONVERSATIONS
        ]  # fmt: skip
        texts = ["Hello there", " Hello", "a  b\n", "é😀", ""]
        encoded = [{"text": one, "ids": plain.encode(one, bos=True, eos=False)} for one in texts]
    value = {"conversations": prompts, "texts": encoded}
    (HERE / "prompts.json").write_text(json.dumps(value, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
