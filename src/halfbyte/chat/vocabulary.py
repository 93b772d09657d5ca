"""What each token id is: bytes of text, or a control token. Plain text to ids, never to control.

Both chat formats, the detokenizer, the router and the grammars look ids up here. How a
conversation becomes ids is in `tokens`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from halfbyte.errors import CheckpointError, RequestError, in_words
from halfbyte.files import MAX_TOKENIZER_BYTES, parse_json_text, read_bounded

MAX_TOKENS = 2**19  # ids; the largest vocabularies in use have 262,144


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one tokenizer: their bytes, and which of them control.

    token_bytes  bytes that each id adds to a text; empty for control tokens
    control      name -> id of every control token
    encode_text  plain text -> ids, none of them a control token, whatever the text says
    encode_start the same for text that nothing but a bos precedes, where that is another; some
                 tokenizers write a space before the first word of all
    """

    token_bytes: tuple[bytes, ...]
    control: Mapping[str, int]
    control_names: Mapping[int, str]
    encode_text: Callable[[str], list[int]]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    encode_start: Callable[[str], list[int]] | None = None

    def encode_first(self, text: str) -> list[int]:
        """Ids of a text at the beginning of all."""
        return (self.encode_start or self.encode_text)(text)

    @property
    def size(self) -> int:
        """Number of ids; the model's head may be padded beyond it."""
        return len(self.token_bytes)

    @property
    def start(self) -> tuple[int, ...]:
        """What begins every prompt: the token for it, where the model has one."""
        return () if self.bos_token_id is None else (self.bos_token_id,)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt: its start and the text, which holds no control token."""
        return (*self.start, *self.encode_first(text))

    def is_control(self, token_id: int) -> bool:
        """Whether the id switches state instead of adding text."""
        return token_id in self.control_names

    def piece(self, token_id: int) -> str:
        """A printable form of one token: its text, or the name of a control token."""
        name = self.control_names.get(token_id)
        if name is not None:
            return name
        return self.token_bytes[token_id].decode("utf-8", errors="replace")

    def decode(self, token_ids: list[int] | tuple[int, ...], *, keep_control: bool = False) -> str:
        """Text of a whole sequence; broken UTF-8 becomes U+FFFD.

        Control tokens are left out, or written by name with `keep_control`.
        """
        names = self.control_names if keep_control else {}
        parts = [
            names[token_id].encode() if token_id in names else self.token_bytes[token_id]
            for token_id in token_ids
        ]
        return b"".join(parts).decode("utf-8", errors="replace")


def tekken_vocabulary(tekken: Tekkenizer) -> Vocabulary:
    """The vocabulary of a tekken.json that mistral-common has read."""
    num_special = tekken.num_special_tokens
    names = {
        token_id: tekken.decode([token_id], special_token_policy=SpecialTokenPolicy.KEEP)
        for token_id in range(num_special)
    }
    token_bytes = tuple(
        b"" if token_id in names else tekken.id_to_byte_piece(token_id)
        for token_id in range(tekken.n_words)
    )

    def encode_text(text: str) -> list[int]:
        try:
            return tekken.encode(text, bos=False, eos=False)
        except ValueError as error:
            raise_if_unreadable(error)
            raise

    return Vocabulary(
        token_bytes=token_bytes,
        control={name: token_id for token_id, name in names.items()},
        control_names=names,
        encode_text=encode_text,
        bos_token_id=tekken.bos_id,
        eos_token_ids=(tekken.eos_id,),
    )


def raise_if_unreadable(error: Exception) -> None:
    """RequestError where tiktoken's regular expression has run out of stack."""
    if "Regex error" in str(error):
        raise RequestError(
            "the text has more than 900,000 blanks or tabs in a row, which the model's tokenizer "
            "cannot read; send fewer",
            code="unsupported_content",
        ) from error


def read_text(path: Path) -> str:
    """A text file of a checkpoint, without its byte order mark; CheckpointError if it is none."""
    try:
        return read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {in_words(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file when it is not one."""
    text = read_text(path)
    try:
        value = parse_json_text(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {in_words(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
