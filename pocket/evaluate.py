"""`python -m pocket.evaluate`: held-out items of every kind, answered by the engine, graded.

Prompts are encoded and answers split by the very code that serves, without the wire between.
Greedy decoding; a record says n, right answers and their share by kind and effort.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.chat.mistral_format import MistralFormat, load_mistral_format
from halfbyte.chat.router import CallArguments, CallStart, Content, Reasoning, Router
from halfbyte.cli.engine_flags import add_engine_arguments, engine_config
from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.engine.generate import generate
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams
from pocket.grade import Answer, is_right
from pocket.items import Item
from pocket.mixture import AT_LENGTH, GRADED, item

MAX_ANSWER_TOKENS = 400
# Wrong answers that a record shows of each kind.
SHOWN = 4


def messages_of(found: Item) -> list[dict[str, Any]]:
    """The conversation in the words of a chat request."""
    messages: list[dict[str, Any]] = []
    if found.system is not None:
        messages.append({"role": "system", "content": found.system})
    pending: list[str] = []
    for turn in found.turns:
        if turn.role == "user":
            parts = [{"type": "image", "image": image} for image in turn.images]
            messages.append(
                {"role": "user", "content": [*parts, {"type": "text", "text": turn.content}]}
            )
        elif turn.role == "tool":
            call_id = pending.pop(0)
            messages.append({"role": "tool", "content": turn.content, "tool_call_id": call_id})
        else:
            message: dict[str, Any] = {"role": "assistant", "content": turn.content or None}
            if turn.thought is not None:
                message["reasoning_content"] = turn.thought
            pending = [f"{len(messages):03d}call{n:02d}" for n in range(len(turn.calls))]
            message["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
                    },
                }
                for call_id, call in zip(pending, turn.calls, strict=True)
            ]
            messages.append(message)
    return messages


def prompt_of(found: Item, chat: MistralFormat) -> tuple[tuple[int, ...], tuple[ImageInput, ...]]:
    """Everything before the last answer, as the server encodes it."""
    encoded = chat.encode(
        messages_of(found)[:-1],
        tools=found.tools,
        reasoning_effort=found.effort,
        json_schema=found.schema,
    )
    images = tuple(ImageInput.of(i.pixels, i.offset, i.num_tokens) for i in encoded.images)
    return encoded.token_ids, images


def answer_of(token_ids: Sequence[int], found: Item, chat: MistralFormat) -> Answer:
    """The answer's parts, as the server splits it."""
    names = frozenset(tool["function"]["name"] for tool in found.tools)
    router = Router(chat.vocabulary, chat.control, tool_names=names, live_calls=False)
    deltas = [delta for token_id in token_ids for delta in router.feed(token_id)]
    content = thought = ""
    calls: list[list[str]] = []
    for delta in [*deltas, *router.finish()]:
        if isinstance(delta, Content):
            content += delta.text
        elif isinstance(delta, Reasoning):
            thought += delta.text
        elif isinstance(delta, CallStart):
            calls.append([delta.name, ""])
        elif isinstance(delta, CallArguments):
            calls[-1][1] += delta.text
    return Answer(content, thought, tuple((name, text) for name, text in calls))


def evaluate(
    engine: Engine, chat: MistralFormat, kind: str, numbers: Sequence[int]
) -> dict[str, Any]:
    """Answers and judgements of held-out items of one kind."""
    started, before = time.perf_counter(), engine.stats()
    items = {str(number): item(kind, number, "test") for number in numbers}
    params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)

    def request_of(name: str, one: Item) -> GenerationRequest:
        prompt, images = prompt_of(one, chat)
        return GenerationRequest(name, prompt, params, images=images)

    answers = generate(engine, (request_of(name, one) for name, one in items.items()))
    judged: dict[str, list[bool]] = {}
    wrong: list[dict[str, Any]] = []
    for name, found in items.items():
        answer = answer_of(answers[name].token_ids, found, chat)
        right = is_right(found, answer)
        judged.setdefault(found.effort, []).append(right)
        if not right and len(wrong) < SHOWN:
            wrong.append(
                {
                    "number": int(name),
                    "asked": found.turns[-2].content[-300:],
                    "thought": answer.thought[-200:],
                    "content": answer.content[-200:],
                    "calls": [list(call) for call in answer.calls],
                    "gold": dict(found.gold),
                    "wanted_thought": found.turns[-1].thought,
                }
            )
    after = engine.stats()
    return {
        "n": len(items),
        "right": sum(map(sum, judged.values())),
        "by_effort": {e: {"n": len(j), "right": sum(j)} for e, j in sorted(judged.items())},
        "answer_tokens": sum(len(one.token_ids) for one in answers.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "steps": after.steps - before.steps,
        "proposed_tokens": after.proposed_tokens - before.proposed_tokens,
        "accepted_tokens": after.accepted_tokens - before.accepted_tokens,
        "wrong": wrong,
    }


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the engine answers items; `config_of` reads them."""
    parser.add_argument("--batch", type=int, default=32, help="sequences at once (%(default)s)")
    add_engine_arguments(parser, only=("mode", "device", "products", "kv_cache"))
    parser.set_defaults(device="cpu")


def config_of(
    args: argparse.Namespace, *, max_model_len: int, kv_cache_tokens: int
) -> EngineConfig:
    """An engine that answers many items at once, where nobody waits for a token."""
    return engine_config(
        args,
        max_model_len=max_model_len,
        max_sequences=args.batch,
        kv_cache_tokens=kv_cache_tokens,
        target_gap_ms="none",
    )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pocket.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the record to write (JSON)")
    parser.add_argument("--items", type=int, default=100, help="items of each kind (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first item")
    usual = [kind for kind in (*GRADED, *AT_LENGTH) if kind != "recall_32k"]
    parser.add_argument(
        "--kinds",
        nargs="*",
        default=usual,
        help="(all but recall_32k, whose items take minutes on a CPU)",
    )
    add_engine_flags(parser)
    parser.add_argument("--speculative", help="ngram, or the folder of an EAGLE head")
    args = parser.parse_args(arguments)
    chat = load_mistral_format(args.checkpoint / "tekken.json")
    config = config_of(args, max_model_len=32768, kv_cache_tokens=131072)
    engine = Engine.load(args.checkpoint, replace(config, speculative=args.speculative))
    record: dict[str, Any] = {
        "checkpoint": args.checkpoint.name,
        "mode": engine.config.mode,
        "device": args.device,
        "products": args.products,
        "kv_cache": engine.config.kv_cache,
        "speculative": args.speculative and Path(args.speculative).name,
        "kinds": {},
    }
    for kind in args.kinds:
        count = args.items if kind not in AT_LENGTH else max(1, args.items // 5)
        found = evaluate(engine, chat, kind, range(args.first, args.first + count))
        record["kinds"][kind] = found
        print(
            f"{kind}: {found['right']} of {found['n']} right {found['by_effort']} "
            f"{found['answer_tokens']} tokens in {found['seconds']} s",
            flush=True,
        )
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    engine.close()


if __name__ == "__main__":
    main()
