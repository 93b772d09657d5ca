"""Free-text answers graded by a model (AA-LCR): the judge's prompt and the reading of its verdict.

Who asks the judge is not here (`run`); a verdict that cannot be read makes the attempt ungraded,
which is missing, never wrong and never right.
Rules: docs/reference/scoring.md#the-judge, after the original protocol's three parts.
"""

import hashlib
import re
import unicodedata

from halfbyte.evals.grading.statements import without_marks
from halfbyte.evals.types import Score, right_or_wrong

JUDGE_PROMPT = """\
Decide whether the CANDIDATE ANSWER below is CORRECT or INCORRECT. \
It is CORRECT only if it is consistent with the OFFICIAL ANSWER.

The question, for reference only: {question}
The OFFICIAL ANSWER: {official}
The CANDIDATE ANSWER to assess: {candidate}

Reply with exactly one word, CORRECT or INCORRECT."""

JUDGE_PROMPT_SHA256 = hashlib.sha256(JUDGE_PROMPT.encode()).hexdigest()

_WORD = re.compile(r"[^\W_]+")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_BOTH = frozenset(("CORRECT", "INCORRECT"))
# Nothing but marks before the word, none of them a "not"; after it the end, or a mark: "Correct
# answer: 7" speaks of the official answer.
_VERDICT = re.compile(
    r"(?:[^\w!¬≠]|_)*(?:IN)?CORRECT(?![^\W_])(?![ \t]+(?!(?:BECAUSE|SINCE|AS|THE|BOTH)\b)[^\W_])"
)
_DOUBT = re.compile(
    r"^[\W_]*CORRECT\s*\?|^[\W_]*CORRECT[\W_]+(?:NO|NOT|NOPE|FALSE|WRONG|BUT|EXCEPT|ONLY|IF)\b|"
    r"\bNOT\s+CORRECT\b|\b(?:IS|WAS)(?:N['’]?T| NOT)\b|\b(?:PARTIALLY|HOWEVER|ACTUALLY)\b|[❌✗✘]"
)
_TAKEN_BACK = re.compile(r"\b(?:WAIT|ON SECOND THOUGHT|LET ME RECONSIDER|CORRECTION)\b")


def judge_prompt(question: str, official: str, candidate: str) -> str:
    """The message sent to the judge; braces in the texts are left alone."""
    parts = {"{question}": question, "{official}": official, "{candidate}": candidate}
    return re.sub(
        r"\{question\}|\{official\}|\{candidate\}", lambda m: parts[m[0]].strip(), JUDGE_PROMPT
    )


def read_verdict(text: str) -> bool | None:
    """True for CORRECT, False for INCORRECT, None for anything else.

    Marks around the word do not matter. Only the first word counts, and exactly: CORRECT is a part
    of INCORRECT, so a search would turn every rejection into praise. A reply that has both words is
    no verdict, nor is one that takes its word back ("CORRECT? No").
    """
    bare = without_marks(_TAG.sub(" ", text)).upper()
    words = _WORD.findall(bare)
    if not words or not _VERDICT.match(bare) or len(_BOTH.intersection(words)) > 1:
        return None
    if _TAKEN_BACK.search(bare) or (words[0] == "CORRECT" and _DOUBT.search(bare)):
        return None
    return {"CORRECT": True, "INCORRECT": False}.get(words[0])


def same_text(official: str, candidate: str) -> bool:
    """The free second metric: equality after folding case, accents, punctuation and spaces."""
    return _fold(official) == _fold(candidate) != ""


def grade_judged(official: str, candidate: str, verdict_text: str | None) -> Score:
    """Score from the judge's stored reply; None or an unreadable reply is ungraded."""
    verdict = None if verdict_text is None else read_verdict(verdict_text)
    details = {"judgement": verdict_text, "exact_match": same_text(official, candidate)}
    if verdict is None:
        reason = f"there is no verdict in the judge's reply {(verdict_text or '')[:200]!r}"
        return Score(None, candidate[:200], "ungraded", {**details, "reason": reason})
    return right_or_wrong(verdict, candidate[:200], **details)


def _fold(text: str) -> str:
    bare = unicodedata.normalize("NFKD", text).casefold()
    kept = [c if c.isalnum() else " " for c in bare if not unicodedata.combining(c)]
    return " ".join("".join(kept).split())
