"""What a server is configured with; built once by the command, never written to.

Every limit is on by default and shown at /health.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from halfbyte.errors import UsageError
from halfbyte.server.defaults import SamplingDefaults
from halfbyte.server.dialect import Setting


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, one key and the whole server may ask for.

    body_brackets      opening brackets of a body, those in texts included
    body_nodes         its arrays and objects; tiny ones by the million would be read for seconds,
                       in which nothing else happens. So would the following four
    body_values        its commas outside texts; where no several prompts are sent, half of them, or
                       as many as the context has tokens
    body_keys          its field names
    body_texts         its texts, field names included
    body_plain_bytes   what is no text in it: numbers, punctuation, blanks
    parts              parts of contents, and tool calls, of all messages together
    stop_tokens        stop_token_ids of a request
    biased_tokens      tokens in a request's logit_bias
    token_requests     /tokenize and /detokenize at once; more get 429
    request_pixels     of all images of a request together, as they are in their files
    queued_requests    answers admitted at once, running ones included; more get 429
    requests_per_key   answers admitted at once for one API key
    request_s          wall clock of one request, from its admission
    drain_s            how long running answers may go on after SIGTERM
    connections        open at once; one more closes the one that has idled longest, or gets 503.
                       Fewer, where the process may not open as many files
    head_s             for a request's head to arrive, and for the rest of a body after its answer
    body_s             for a request's body to arrive, and a second more for every 50 kB of it
    stall_s            in which a client must take something of what waits for it
    """

    body_bytes: int = 32_000_000
    body_brackets: int = 1_000_000
    body_nodes: int = 50_000
    body_values: int = 600_000
    body_keys: int = 60_000
    body_texts: int = 200_000
    body_plain_bytes: int = 8_000_000
    messages: int = 4096
    parts: int = 4096
    choices: int = 16
    stops: int = 16
    stop_chars: int = 1000
    stop_tokens: int = 256
    biased_tokens: int = 4096
    prompts: int = 128
    tools: int = 256
    images: int = 32
    image_bytes: int = 20_000_000
    image_pixels: int = 40_000_000
    request_pixels: int = 400_000_000
    schema_bytes: int = 262_144
    schema_depth: int = 64
    compile_s: float = 10.0
    token_requests: int = 64
    queued_requests: int = 512
    requests_per_key: int = 256
    request_s: float = 3600.0
    drain_s: float = 30.0
    retry_after_s: int = 2
    connections: int = 1024
    head_s: float = 10.0
    body_s: float = 15.0
    stall_s: float = 120.0


def read_limits(settings: Iterable[str], base: Limits) -> Limits:
    """Limits with some changed by "name=value"; UsageError for what is no limit or no number."""
    kinds = {one.name: type(getattr(base, one.name)) for one in fields(Limits)}
    changed: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds:
            known = ", ".join(kinds)
            raise UsageError(f"--limit {setting}: no limit is called {name!r}; there are: {known}")
        try:
            value = kinds[name](text)
        except ValueError:
            kind = "whole number" if kinds[name] is int else "number"
            raise UsageError(f"--limit {setting}: {text!r} is not a {kind}") from None
        if not 0 <= value < float("inf"):
            raise UsageError(f"--limit {setting}: the limit must be 0 or more, and finite")
        changed[name] = value
    return replace(base, **changed)


@dataclass(frozen=True, slots=True)
class ImageFetch:
    """Whether http(s) image URLs are fetched (decision 0011); `data:` URLs always work.

    hosts          exact names, or ".example.com" for a domain and what is below it; "*" for any
    """

    hosts: tuple[str, ...] = ()
    max_redirects: int = 3
    deadline_s: float = 10.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How one server behaves: what it serves, to whom, and within which limits.

    model_names     names that requests may use; responses carry the first
    max_model_len   most tokens of a prompt and its answer together
    vocab_size      rows of the model's head, padding included
    api_keys        empty = no key is asked for
    allowed_hosts   names that requests may ask for, beside addresses and local names
    allowed_origins origins whose web pages may use the API
    sampling        what requests get that do not say how to sample
    unknown_fields  "accept" leaves out what nobody knows and names it; "refuse" answers 400
    strict_effort   refuse reasoning efforts that the model does not know, instead of the nearest
    dialect         the form of chat answers; "auto" goes by the client
    facts           further lines for /health: resolved engine configuration, fallbacks
    """

    model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    image_fetch: ImageFetch = field(default_factory=ImageFetch)
    vllm_metric_names: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    unknown_fields: Literal["accept", "refuse"] = "accept"
    strict_effort: bool = False
    dialect: Setting = "auto"
    facts: tuple[tuple[str, object], ...] = ()
