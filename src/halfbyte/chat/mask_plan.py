"""The rules that an answer is held to, as they travel to the engine, and the masks made of them."""

from dataclasses import dataclass

from halfbyte.chat.grammar_follow import GrammarMasks
from halfbyte.chat.grammar_masks import CheckedGrammar, Mask, ThoughtMask
from halfbyte.chat.prompt import ControlTokens
from halfbyte.chat.vocabulary import Vocabulary
from halfbyte.errors import RequestError


@dataclass(frozen=True, slots=True)
class Beginning:
    """The text that an answer begins with; `path` is where the request has it."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """The rules that the tokens of one answer are held to.

    grammar           of what follows a thought; None for no rules
    banned_token_ids  never allowed, whatever the grammar says
    thinks            a thought may come first
    budget            most tokens inside a thought; None for no bound
    begun             the beginning of an answer that is to be continued
    """

    grammar: CheckedGrammar | None
    banned_token_ids: tuple[int, ...] = ()
    thinks: bool = False
    budget: int | None = None
    begun: Beginning | None = None


class MaskMaker:
    """Makes masks for one model. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, control: ControlTokens) -> None:
        self._vocabulary = vocabulary
        self._control = control
        self._grammars = GrammarMasks(vocabulary)

    def is_quick(self, plan: MaskPlan) -> bool:
        """Whether a plan's mask can be made without compiling a grammar or reading a beginning."""
        if plan.begun is not None:
            return False
        return plan.grammar is None or self._grammars.is_ready(plan.grammar)

    def make(self, plan: MaskPlan) -> Mask:
        """A fresh mask that holds the answer to its plan.

        Raises RequestError if the rules do not allow the beginning, or if there is no room for the
        grammar.
        """
        inner = None
        if plan.grammar is not None:
            inner = self._grammars.mask(plan.grammar, plan.banned_token_ids)
            if plan.begun is not None:
                token_ids = self._vocabulary.encode_text(plan.begun.text)
                num_fitting = inner.begin(token_ids)
                if num_fitting < len(token_ids):
                    raise self._cannot_begin(plan.begun, token_ids[:num_fitting])
        if not plan.thinks:
            assert inner is not None, "a plan without a grammar and without a thought"
            return inner
        return ThoughtMask(
            self._vocabulary,
            self._control,
            inner,
            plan.budget,
            has_begun=plan.begun is not None,
        )

    def _cannot_begin(self, begun: Beginning, fitting: list[int]) -> RequestError:
        shown = self._vocabulary.decode(fitting)[-100:]
        return RequestError(
            f"{begun.path}: the answer cannot begin so: what response_format or tools "
            f"allow departs from it after {shown!r}",
            param=begun.path,
        )
