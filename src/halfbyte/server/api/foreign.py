"""Names that other servers' clients use, and what they mean here.

`wire` knows one name for one thing. What clients of Mistral's API and of vLLM send is put into
those names before it is read: aliases are renamed, values that ask for what happens anyway are
taken out, and a value that would change the answer and cannot be honoured is refused by name, with
what to do. Whatever nobody knows is left to `reading.parse`.

Sources: the public references of Mistral's, OpenAI's and vLLM's APIs, and recorded requests.
"""

from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.errors import RequestError
from halfbyte.server.api import reading, wire
from halfbyte.server.api.responses_wire import ResponsesRequest

_RENAMED = {"random_seed": "seed", "thinking_token_budget": "max_reasoning_tokens"}

# Taken out whatever they say, since no token depends on them; `warn` says what is not done.
_WITHOUT_EFFECT: dict[str, str] = {
    "prediction": "",
    "client_metadata": "",
    "prompt_cache_options": "",
    "request_id": "",
    "spaces_between_special_tokens": "",
    "guided_decoding_backend": "",
    "guided_whitespace_pattern": "",
    "cache_salt": "cache_salt: the prefix cache is shared by all requests",
    "max_tool_calls": "max_tool_calls: it bounds hosted tools, and there are none here",
}

_Neutral = tuple[tuple[Any, ...], str]

# Names with the values that ask for what happens anyway, and what to do about any other value.
_BOTH: dict[str, _Neutral] = {
    "safe_prompt": ((False,), "there is no safety prompt here; write one as a system message"),
    "skip_special_tokens": ((True,), "text never holds control tokens; /detokenize shows them"),
    "use_beam_search": ((False,), "answers are sampled; there is no beam search"),
    "length_penalty": ((1, 1.0), "it belongs to beam search, which is not here"),
    "early_stopping": ((False,), "it belongs to beam search, which is not here"),
    "bad_words": (([],), "use logit_bias with -100"),
    "allowed_token_ids": (([],), "use response_format to hold the answer"),
    "truncate_prompt_tokens": ((), "shorten the prompt yourself; /tokenize counts it"),
    "detokenize": ((True,), "answers are text"),
    "logits_processors": (([],), "code in requests is not run"),
    "return_tokens_as_token_ids": ((False,), "use return_token_ids"),
    "suffix": (("",), "there is no model for filling in the middle here"),
    "kv_transfer_params": (({},), "caches are not moved between servers here"),
    "mm_processor_kwargs": (({},), "images are read as the checkpoint says"),
    "vllm_xargs": (({},), "there are no plugins here"),
}
_CHAT: dict[str, _Neutral] = {
    "add_generation_prompt": ((True,), "use continue_final_message"),
    "add_special_tokens": ((False,), "the chat format writes its own special tokens"),
    "best_of": ((1,), "use n"),
    "echo": ((False,), "use /v1/completions"),
    "functions": (([],), "use tools"),
    "audio": ((), "there is no audio here"),
    "web_search_options": ((), "there is no web search here"),
    "documents": (([],), "write documents into messages"),
    "chat_template": ((), "the checkpoint's own template is used"),
    "top_logprobs": ((0,), "top_logprobs is only allowed when logprobs is true"),
}
_TEXT: dict[str, _Neutral] = {
    "add_special_tokens": ((True,), "send token ids as the prompt"),
}
_RESPONSES: dict[str, _Neutral] = {
    "top_logprobs": ((0,), "use /v1/chat/completions with logprobs"),
    "background": ((False,), "nothing is stored here, so an answer cannot be fetched later"),
    "previous_response_id": ((), "nothing is stored here; send the whole conversation"),
    "conversation": ((), "nothing is stored here; send the whole conversation"),
    "prompt": ((), "nothing is stored here; send the prompt's text as input"),
    "context_management": (([],), "nothing is compacted here; send a shorter conversation"),
}

_GUIDES = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


def translate(kind: type[reading.Wire], body: Any, warn: Callable[[str], None]) -> Any:
    """The body of a request in the names of `wire`; other kinds of requests come back as they are.

    warn   takes a sentence about each thing that is left out although somebody may miss it

    Raises RequestError for what would change the answer and cannot be honoured.
    """
    if not isinstance(body, dict):
        return body
    if kind is wire.ChatRequest:
        return _chat(_common(body, _BOTH | _CHAT, warn), warn)
    if kind is wire.CompletionRequest:
        return _structured(_common(body, _BOTH | _TEXT, warn), warn)
    if kind is ResponsesRequest:
        body = _common(body, _RESPONSES, warn)
        return _verbosity(body, body.get("text"), warn)
    return body


def _common(
    body: Mapping[str, Any], neutral: Mapping[str, _Neutral], warn: Callable[[str], None]
) -> dict[str, Any]:
    body = {name: value for name, value in body.items() if value is not None}
    for foreign, ours in _RENAMED.items():
        if foreign in body:
            value = body.pop(foreign)
            if body.setdefault(ours, value) != value:
                raise RequestError(f"{foreign} and {ours} differ; send one of them", param=foreign)
    for name, told in _WITHOUT_EFFECT.items():
        if body.pop(name, None) is not None and told:
            warn(told)
    if _is_number(body.get("priority")) and body["priority"] < 0:
        body["priority"] = 0
        warn("priority: nobody goes ahead of others; 0 is the usual turn, larger numbers wait")
    for name, (values, advice) in neutral.items():
        if name not in body:
            continue
        if name == "top_logprobs" and (body.get("logprobs") or not values):
            continue
        value = body[name]
        if any(value == one and type(value) is type(one) for one in values):
            del body[name]
        else:
            raise RequestError(f"{name}: {advice}", param=name, code="unsupported_parameter")
    return body


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _chat(body: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    body = _structured(_verbosity(body, body, warn), warn)
    if body.get("tool_choice") == "any":
        body["tool_choice"] = "required"
    if body.get("function_call") in ("none", "auto"):
        del body["function_call"]
    if body.get("prompt_mode") == "reasoning":
        body.setdefault("reasoning_effort", "high")
        del body["prompt_mode"]
    settings = body.pop("chat_template_kwargs", None)
    if settings is None:
        return body
    if not isinstance(settings, dict):
        raise RequestError("chat_template_kwargs: must be an object", param="chat_template_kwargs")
    for name, value in settings.items():
        path = f"chat_template_kwargs.{name}"
        if name in ("enable_thinking", "thinking") and isinstance(value, bool):
            body.setdefault("reasoning_effort", "high" if value else "none")
        elif name == "reasoning_effort" and isinstance(value, str):
            body.setdefault(name, value)
        elif name in ("continue_final_message", "add_generation_prompt"):
            if name == "continue_final_message":
                body.setdefault(name, value)
        elif value is not None:
            warn(f"{path} is left out: the chat format has no place for it")
    return body


def _verbosity(body: dict[str, Any], holder: Any, warn: Callable[[str], None]) -> dict[str, Any]:
    """Take out a wish for shorter or longer answers: no model here was taught it."""
    if isinstance(holder, dict) and holder.get("verbosity") in ("low", "medium", "high"):
        if holder["verbosity"] != "medium":
            warn("verbosity: this model does not know it; say so in a message")
        if holder is body:
            return {name: value for name, value in body.items() if name != "verbosity"}
        text = {name: value for name, value in holder.items() if name != "verbosity"}
        return {**body, "text": text}
    return body


def _structured(body: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """`structured_outputs` and the older `guided_*` of vLLM as a response_format."""
    found: dict[str, tuple[str, Any]] = {}
    held = body.pop("structured_outputs", None)
    if held is not None and not isinstance(held, dict):
        raise RequestError("structured_outputs: must be an object", param="structured_outputs")
    for guide in _GUIDES:
        value = (held or {}).get(guide)
        if value is not None and value is not False:
            found[f"structured_outputs.{guide}"] = (guide, value)
        value = body.pop(f"guided_{guide}", None)
        if value is not None and value is not False:
            found[f"guided_{guide}"] = (guide, value)
    if not found:
        return body
    names = list(found)
    if len(found) > 1 or (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        others = ", ".join(
            [*names[1:], *(["response_format"] if "response_format" in body else [])]
        )
        raise RequestError(f"{names[0]} together with {others}: send one of them", param=names[0])
    ((path, (guide, value)),) = found.items()
    body["response_format"] = _format_of(path, guide, value)
    return body


def _format_of(path: str, guide: str, value: Any) -> dict[str, Any]:
    if guide == "json":
        if isinstance(value, str):
            value = reading.parse_json(value.encode("utf-8", "surrogatepass"))
        if not isinstance(value, dict):
            raise RequestError(f"{path}: must be a JSON schema", param=path)
        schema = {"name": "answer", "schema": value, "strict": True}
        return {"type": "json_schema", "json_schema": schema}
    if guide == "json_object":
        return {"type": "json_object"}
    if guide == "structural_tag":
        raise RequestError(
            f"{path}: use tools, or a grammar", param=path, code="unsupported_parameter"
        )
    return {"type": guide, "choices" if guide == "choice" else guide: value}
