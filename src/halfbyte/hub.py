"""The hub, asked through its own client: opened, one commit found, refusals in words for people.

`checkpoint.hub` fetches checkpoints through it, `calibrate.sources` streams data sets, and
`card.publish` sends files. The client is optional; without it each of them says what to install.
"""

import re
from typing import Any, Literal, NamedTuple, NoReturn

from halfbyte.errors import UnsupportedError, UsageError, how_to_get

# The beginning of a commit's id; a whole one has 40 digits.
_BEGINNING = re.compile(r"[0-9a-f]{4,39}")


class Hub(NamedTuple):
    """The hub's client, and the errors that it raises.

    package    the module huggingface_hub
    api        its HfApi for the wanted endpoint
    refusals   what it raises when the hub refuses or is not reached
    errors     these, and what this machine raises on the way
    transport  of these, the error of a connection
    """

    package: Any
    api: Any
    refusals: tuple[type[Exception], ...]
    errors: tuple[type[Exception], ...]
    transport: type[Exception]


def open_hub(doing: str, endpoint: str | None = None) -> Hub:
    """The hub's client, imported now. Raises UnsupportedError without it: "`doing` needs ..."."""
    try:
        import huggingface_hub as package  # optional: extra `hub`
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.errors import HTTPError as TransportError
    except ImportError as error:
        raise UnsupportedError(f"{doing} needs huggingface_hub; {how_to_get('hub')}") from error
    refusals = (HfHubHTTPError, HFValidationError, TransportError)
    api = package.HfApi(endpoint=endpoint)
    return Hub(package, api, refusals, (*refusals, OSError), TransportError)


def whole_commit(
    hub: Hub,
    name: str,
    wanted: str | None,
    kind: Literal["model", "dataset"],
    where: str,
    called: str = "",
) -> str:
    """The whole id of a commit, as the hub takes no beginnings of one.

    wanted   a commit, its beginning, a branch, a tag, or None for the newest
    where    begins the message, and `called` what it says of `wanted`
    Raises UsageError if no commit begins so, and what the hub raises.
    """
    info = hub.api.model_info if kind == "model" else hub.api.dataset_info
    if wanted is None or not _BEGINNING.fullmatch(wanted):
        return str(info(name, revision=wanted).sha)
    newest = str(info(name).sha)
    if newest.startswith(wanted):
        return newest
    for commit in hub.api.list_repo_commits(name, repo_type=kind):
        if str(commit.commit_id).startswith(wanted):
            return str(commit.commit_id)
    raise UsageError(f"{where}: no commit begins with {called}{wanted}; the newest is {newest}")


def refuse(what: str, advice: str, error: Exception) -> NoReturn:
    """Raise UnsupportedError with the first line of what the hub said, and what to do."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnsupportedError(f"{what}: {first}. {advice}") from error
