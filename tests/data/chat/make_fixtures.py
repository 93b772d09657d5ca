"""Make the two small tokenizers beside this script; run it again to reproduce them.

tekken/        a v15 tekken.json: the first 700 ranks of the vocabulary that mistral-common ships,
               64 control tokens with the official ids
chatml/        a byte-level BPE of 500 tokens with a ChatML template, trained on the text below
"""

import json
from importlib.resources import files
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
RANKS, SPECIALS = 700, 64

NAMED = {
    **dict(enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"])),
    **dict(enumerate(["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], start=6)),
    **dict(enumerate(["[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"], start=9)),
    **dict(enumerate(["[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]"], start=14)),
    **dict(enumerate(["[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"], start=18)),
    **dict(enumerate(["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"], start=32)),
    **dict(enumerate(["[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"], start=36)),
}

TEXT = """The capital of France is Paris. What is the capital of Italy? It is Rome, of course.
You are a helpful assistant. Please answer the question in one word, then explain why.
system user assistant Hello, how are you today? {"name": "value", "list": [1, 2, 3]} return x + 1
Tell me a story about a quiet house by the sea where nobody had lived for a hundred years.
"""

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
    " + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tekken(directory: Path, ranks: int = RANKS, specials: int = SPECIALS) -> None:
    directory.mkdir(exist_ok=True)
    source = json.loads(files("mistral_common").joinpath("data/tekken_240911.json").read_text())
    value = {
        "config": {
            **source["config"],
            "num_vocab_tokens": ranks,
            "default_vocab_size": ranks + specials,
            "default_num_special_tokens": specials,
            "version": "v15",
        },
        "vocab": source["vocab"][:ranks],
        "special_tokens": [
            {"rank": i, "token_str": NAMED.get(i, f"<SPECIAL_{i}>"), "is_control": True}
            for i in range(specials)
        ],
        "image": {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2},
        "model_settings_builder": {
            "reasoning_effort": {
                "type": "enum",
                "accepts_none": True,
                "default": "none",
                "values": ["none", "high"],
            }
        },
    }
    (directory / "tekken.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def make_chatml(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "model_max_length": 512}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    make_tekken(HERE / "tekken")
    make_chatml(HERE / "chatml")
