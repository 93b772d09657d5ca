"""What makes a job of a request: the chat format, limits, grammars, and where texts are read."""

import asyncio

from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_limits import GrammarLimits
from halfbyte.chat.prompt import banned_control_ids, banned_in_text
from halfbyte.chat.tokens import ChatFormat
from halfbyte.errors import RequestError
from halfbyte.server.api.aside import Aside
from halfbyte.server.api.reader import Reader
from halfbyte.server.api.stream import BodyRoom
from halfbyte.server.config import ServerConfig


class Preparer:
    """One model's means to check requests and to make prompts and rules of them.

    It knows neither the engine nor other requests.
    """

    def __init__(self, chat: ChatFormat, config: ServerConfig) -> None:
        self.chat = chat
        self.config = config
        self.reader = Reader(chat, config)
        self.aside = Aside(self.reader, chat.directory, config)
        self.body_room = BodyRoom(4 * config.limits.body_bytes)
        # One picture is decoded at a time: the largest take 300 MB until they are scaled.
        self.decoding = asyncio.Lock()
        self.compiler = GrammarCompiler(
            chat.vocabulary,
            GrammarLimits(
                max_source_bytes=config.limits.schema_bytes, max_depth=config.limits.schema_depth
            ),
        )
        self.banned_in_text = banned_in_text(chat.vocabulary, chat.image_layout, config.vocab_size)
        padding = tuple(range(chat.vocabulary.size, config.vocab_size))
        self._banned = {
            (thinking, tools): padding
            + banned_control_ids(chat.vocabulary, chat.control, thinking=thinking, tools=tools)
            for thinking in (False, True)
            for tools in (False, True)
        }

    def banned_in_chat(self, *, thinking: bool, tools: bool) -> tuple[int, ...]:
        """Token ids that an answer of a conversation may not contain."""
        return self._banned[thinking, tools]

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) for a model that this server does not serve."""
        if name is not None and name not in self.config.model_names:
            known = ", ".join(self.config.model_names)
            raise RequestError(
                f"the model {name!r} does not exist; this server has: {known}",
                param="model",
                code="model_not_found",
                status=404,
            )
