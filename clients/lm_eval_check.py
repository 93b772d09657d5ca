"""lm-eval's local-completions against the demo's model: its log-likelihoods are those of the engine.

The documents are made here and the tasks read them from files, so that no hub is asked. The last
choice of each document ends where the model would end its answer: there a server that has no entry
for the ending token makes lm-eval cut off the continuation's last token.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.server.launch import Front, launch
from halfbyte.server.run import serving

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "python"))

from cases import case, main  # noqa: E402

BUILD = HERE.parent / "build" / "clients"
MODEL = BUILD / "smollm2"
TOLERANCE = 1e-3
MAX_TOKENS = 12

DOCUMENTS = [
    {"question": question, "choices": choices, "gold": 0}
    for question, choices in (
        ("What color is the sky?", ["blue.", "green", "blue"]),
        ("What is the capital of France?", ["Paris.", "Rome", "Paris"]),
        ("How many legs has a dog?", ["four.", "six legs", "4"]),
        ("What do cows drink?", ["water.", "milk and tea", "water, of course."]),
    )
]
CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""
TEXT = """task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: {max_tokens}
  temperature: 0
metric_list:
  - metric: exact_match
"""


def prompt_of(document: dict[str, Any]) -> str:
    """What the tasks ask."""
    return f"Question: {document['question']}\nAnswer:"


def samples(url: str, task: str) -> list[dict[str, Any]]:
    """What lm-eval has logged for each document of a task."""
    folder = Path.cwd() / task
    command = [
        str(BUILD / "lmeval" / "bin" / "lm_eval"), "run", "--model", "local-completions",
        "--model_args",
        f"model=smol,base_url={url}/v1/completions,tokenizer_backend=remote,max_retries=1",
        "--tasks", task, "--include_path", str(Path.cwd()), "--output_path", str(folder),
        "--log_samples",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-1500:]
    (file,) = folder.rglob("samples_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def direct(engine: Engine, encode: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of a continuation by teacher forcing, and whether it is the likeliest one."""
    import torch

    ids = encode(context + continuation)
    start = len(encode(context))
    logits = torch.cat(list(engine.score(ids))).float()
    told = torch.log_softmax(logits, dim=-1)[start - 1 : len(ids) - 1]
    wanted = torch.tensor(ids[start:])
    return float(told.gather(1, wanted[:, None]).sum()), bool((told.argmax(1) == wanted).all())


def continued(engine: Engine, vocabulary: Any, prompt: str) -> str:
    """What greedy decoding says up to the end of a line, from the scores of ever longer texts."""
    ids = list(vocabulary.encode_text(prompt))
    start = len(ids)
    while len(ids) - start < MAX_TOKENS:
        token_id = int(list(engine.score(ids))[-1][-1].argmax())
        if token_id in vocabulary.eos_token_ids:
            break
        ids.append(token_id)
        if "\n" in vocabulary.decode(ids[start:]):
            break
    return str(vocabulary.decode(ids[start:])).partition("\n")[0]


def start() -> str:
    """The model and the tasks, made where they are not."""
    if not (MODEL / "config.json").exists():
        import_gguf(packaged_file("smollm2"), MODEL)
    data = Path.cwd() / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in (("choice", CHOICE), ("text", TEXT)):
        Path(f"{name}.yaml").write_text(text.format(data=data, max_tokens=MAX_TOKENS))
    return str(data)


@case("log-likelihoods and texts equal the engine's")
def check() -> str:
    start()
    config = EngineConfig(max_model_len=2048, kv_cache_tokens=8192, max_sequences=4)
    app = launch(MODEL, config, Front(names=("smol",), access_log=None))
    with serving(app) as url:
        choices, texts = samples(url, "local_choice"), samples(url, "local_text")
    engine = Engine.load(MODEL, config)
    vocabulary = load_chat(MODEL).vocabulary
    encode = vocabulary.encode_text
    worst, compared = 0.0, 0
    for sample in choices:
        context = prompt_of(sample["doc"])
        for choice, told in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            logprob, greedy = direct(engine, encode, context, " " + choice)
            worst = max(worst, abs(float(told[0]) - logprob))
            compared += 1
            assert str(told[1]) == str(greedy), (context, choice, told, greedy)
    assert compared == 3 * len(DOCUMENTS), compared
    assert worst <= TOLERANCE, f"log-likelihoods differ by up to {worst}"
    assert len(texts) == len(DOCUMENTS)
    for sample in texts:
        (text,) = sample["filtered_resps"]
        wanted = continued(engine, vocabulary, prompt_of(sample["doc"]))
        assert text == wanted, (text, wanted)
    said = f"{compared} log-likelihoods, the largest difference {worst:.1e}"
    return f"{said}; {len(texts)} generated texts are the same"


if __name__ == "__main__":
    main()
