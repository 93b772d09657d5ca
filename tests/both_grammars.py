"""Both halves of what holds answers in one object: the server's checks and the engine's masks."""

from collections.abc import Sequence

from halfbyte.chat.grammar import GrammarCompiler
from halfbyte.chat.grammar_follow import GrammarMask, GrammarMasks
from halfbyte.chat.grammar_limits import GrammarLimits
from halfbyte.chat.grammar_masks import CheckedGrammar
from halfbyte.chat.vocabulary import Vocabulary


class Grammars(GrammarCompiler):
    """A compiler that makes masks, too."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits | None = None) -> None:
        super().__init__(vocabulary, limits)
        self.masks = GrammarMasks(vocabulary, limits)

    def mask(self, grammar: CheckedGrammar, banned_token_ids: Sequence[int] = ()) -> GrammarMask:
        return self.masks.mask(grammar, banned_token_ids)

    def used_bytes(self) -> int:
        return self.masks.used_bytes()
