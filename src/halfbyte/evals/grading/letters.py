"""The one letter extractor of the three multiple-choice benchmarks.

Four rules, from most to least explicit; the first that finds a statement decides, and within a rule
the last statement does. A statement of several letters, or none at all, leaves the text unparsed:
nothing is guessed. What is read does not depend on which letter it is: "A" and "I" are words, too,
so after *any* bare letter only punctuation or words that no article can have before them are
allowed ("C because", not "C function"). Decision 0056 has the reasons.
Rules: docs/reference/scoring.md#letters.
"""

import re
from dataclasses import dataclass

from halfbyte.evals.grading.statements import FORMAL, HEADING, KEYS, last_boxed, without_marks
from halfbyte.evals.types import Score, right_or_wrong, unparsed

__all__ = ["extract_letter", "grade_letter", "last_boxed"]

SEVERAL = "several"
_BULLETS = "#-•>→⇒ \t👉➡✅✔🔹🔸▶➤➜\ufe0f"  # what a last line may begin with
_AHEAD = 400  # characters that are looked at behind a letter

# The example in an echoed instruction: "(for example 'Answer: A')".
_ECHO = re.compile(r"\((?:for example|e\.g\.|such as)[\s,]*answer:[^)\n]*\)", re.IGNORECASE)

_OPTION_WORD = (
    r"(?:(?:the|la|le|el|il|die|de|o|a)\s+|l['’])?(?:correct\s+|right\s+|best\s+)?"
    r"(?:options?|choices?|letter|alternative|buchstabe|möglichkeit|opción|opcion|letra|"
    r"alternativa|"
    r"inciso|opzione|lettera|opção|opcao|optie|letter|choix|lettre|proposition|antwort|réponse|"
    r"respuesta|risposta|resposta|antwoord|answer|选项|選項|選択肢|옵션|보기|선택지|الخيار|الحرف)"
)
_CHOICE = re.compile(
    rf"(?:{_OPTION_WORD}\s*[:#]?\s*|(?:la|le|el|il|die|the|(?-i:a)|it\s+is|it['’]?s)"
    r"\s+(?=[(\[]?(?-i:[A-Z])(?![^\W_])))?"
    r"(?P<open>(?:[(\[{<]|\\(?:boxed|fbox|framebox)\s*\{?|\s)*)"
    rf"(?:{_OPTION_WORD}\s*[:#]?\s*[(\[{{]?\s*)?"
    r"(?P<letter>[A-Za-z])(?P<close>(?:\s*[)\]}>])*)",
    re.IGNORECASE,
)
# A letter that goes on as something else: "Cat", "C2", "I'm", "f(x)", "C-14", "E = mc", "C++".
# Units, ions and bonds, too: "C/m", "J/(kg K)", "A·s", "F−", "C≡C".
_GOES_ON = re.compile(
    r"(?!\\(?:lor|land|vee|wedge|cup|cap)(?![A-Za-z]))"
    r"(?:[^\W_]|['’^+#%(\\_](?![()\[\]\s}])|[-–—≡·⋅∙][^\W_]|\s*=|\.[A-Za-z]\b|"
    r"/(?:\(|[^\W\dA-Z_]|[^\W_]+[\^²³]|[K-Z]\b)|[-–—][ \t]*(?=[.,;]?(?:$|\n)))",
)
# Scripts that are written without blanks, or right to left, after the letter.
_CJK = re.compile(r"[\u0600-\u06ff\u2e80-\ud7ff\uf900-\ufaff]")
_WORD = re.compile(r"[ \t]+(?P<word>[^\W\d_]+)")
# Words that may follow a bare letter: neither an article nor the pronoun I can stand before them.
_FOLLOWING = """
because since as if although though while whereas when where unless for from by with via per due
given according based rather instead under and or but nor so which that this these those it its they
we is has does are matches satisfies follows holds corresponds seems gives fits looks works equals
represents describes states remains
weil da denn ist wegen aufgrund und oder sondern nicht
car parce puisque est et ou mais
porque ya es pues debido y pero que
perché perche poiché è in quanto ma
pois é já mas
omdat want aangezien en of maar
"""
_FOLLOWERS = frozenset(_FOLLOWING.split())
_DENIED = re.compile(
    r"\s*(?:is|are|ist|est|es|è|é)\s+(?:therefore\s+|thus\s+|clearly\s+|definitely\s+|also\s+)*"
    r"(?:incorrect|wrong|false|not\b|nicht|falsch|faux|fausse|incorrecta?|falsa?|sbagliata|onjuist|"
    r"ruled\s+out|eliminated|impossible)|\s*(?:(?:では|じゃ)(?:ない|ありません|なく)|[가이]\s*아[니닙]|不对|不正确|错)|"
    r"\s*(?:isn['’]?t|would|could|might|may|can(?:['’]?t|not))\b",
    re.IGNORECASE,
)
_AND = (
    r"(?:,\s*(?:and|or|und|oder|et|ou|y|o|e|en|of)\b|and/or\b|as\s+well\s+as\b|plus\b|and\b|or\b|"
    r"und\b|oder\b|et\b|ou\b|y\b|u\b|o\b|e\b|en\b|of\b|&|/|\+|和|或者?|及|与|と|や|または|および|"
    r"와|과|또는|및|그리고|أو\b|و|\\(?:lor|land|vee|wedge|cup|cap)(?![A-Za-z])|sowie\b|"
    r"along\s+with\b)"
)
_MAYBE = (
    r"(?:\s*(?:maybe|perhaps|possibly|probably|vielleicht|peut-être|quizás?|forse|talvez|"
    r"misschien))?"
)
_OTHER = (
    rf"{_MAYBE}\s*(?:{_OPTION_WORD}\s+)?(?:\\(?:boxed|fbox)\s*\{{\s*)?[(\[{{<]*\s*"
    rf"(?P<other>[A-Z])(?![A-Za-z0-9])"
)
_JOINED = re.compile(
    rf"[)\]}}>.?!]*\s*(?:{_AND}{_OTHER}|\(\s*(?:or|oder|ou|o|of|maybe|perhaps|possibly)"
    rf"{_OTHER.replace('other', 'bracketed')}\s*\))"
)
_ROMAN = re.compile(rf"[)\]}}>]*\s*(?:,|{_AND})\s*[(\[]?(?:II|III|IV|VI{{0,3}}|IX)\b")
_LISTED = re.compile(
    rf"[)\]}}>]*\s*(?:[,;、|→]|(?<=[)\]}}])(?=\s*[(\[{{])){_OTHER}(?=[)\]}}>]*\s*(?:$|"
    rf"[,.;、)\n&/]|{_AND}|are\b|sind\b|sont\b|son\b|"
    r"[\u0600-\u06ff\u2e80-\ud7ff\uff00-\uffef]))"
)
# "C; A and B are too light": what follows is said of the others.
_OTHERS_FAIL = re.compile(
    r"[)\]}>]*\s+(?:(?:are|is|were|do|does|sind|sont|son|sono|são|zijn)\s+)?(?:all\s+|both\s+|"
    r"alle\s+|"
    r"clearly\s+)?(?:wrong|incorrect|false|fail|fails|not|too|excluded|ruled|eliminated|"
    r"impossible|falsch|"
    r"faux|fausses|incorrectas|sbagliate|erradas|onjuist)\b",
    re.IGNORECASE,
)
_SPACED = re.compile(
    r"[)\]}>]*(?:[ \t]+[A-Z])*[ \t]+(?:-[ \t]+)?[(\[{<]*(?P<other>[A-Z])[)\]}>]*[ \t]*\.?[ \t]*"
    r"(?=$|\n)"
)

_LINK_WORDS = (
    r"(?:(?<![^\W_])(?:is|was|would\s+be|should\s+be|must\s+be|has\s+to\s+be|will\s+be|"
    r"appears\s+to\s+be|seems\s+to\s+be|ist|lautet|wäre|est|sera|serait|es|sería|seria|è|"
    r"sarebbe|é|luidt)(?![^\W_])|"
    r"选择?(?!项)|選擇?(?!項)|应该是|應該是|应为|應為|应是|是|为|為|は|が|은|는|이|هي|هو|:|=)"
)
_ADVERBS = (
    r"(?:[\s,:]*(?:therefore|thus|hence|then|clearly|definitely|simply|indeed|again|still|also|"
    r"obviously|actually|now|in\s+fact|most\s+likely|likely|probably|consequently|daher|somit|"
    r"folglich|donc|ainsi|por\s+(?:lo\s+)?tanto|entonces|quindi|dunque|pertanto|portanto|então|"
    r"logo|dus|daarom|in\s+my\s+(?:opinion|view)|因此|所以|故)\b)*[\s,:、]*"
)
_ADJECTIVES = (
    r"(?:\s+(?:finale?|correct[aeo]?|corretta|correta|richtige?|juste|exacte|giusta|esatta|certa|"
    r"juiste?|الصحيحة|الصحيح|النهائية))?"
)
_CHOICE_NOUN = (
    r"(?:(?:correct|right|best|final|my|our|only|chosen|selected|正しい|올바른|richtige|bonne|"
    r"correcta|corretta|correta|giusta|"
    r"juiste|正确|正確)(?:e|en|er)?\s*(?:final\s+|correct\s+)?(?:option|choice|alternative|statement|"
    r"pick|guess|selection|letter|one|opzione|opção|optie|lösung|选项|選項|的?选项|選択肢|選択|선택지|보기|답)|"
    r"gabarito|الخيار\s+الصحيح|الحل|"
    r"(?:option|choice)\s+(?:that\s+)?I\s+(?:choose|pick|select|chose)|"
    r"(?<![^\W_])(?:opción|opcion|option|opzione|opção|alternativa|lettera|letra|lettre)"
    r"\s+(?:correct[aeo]?|corretta|correta|juste|giusta|esatta|certa))"
)
_TO_WHAT = r"(?:\s+(?:to|for|of|in|here|à|zu|auf|della|do|da|op|van)\b[^.:;!?\n]{0,60}?)?"
_PHRASE = re.compile(
    rf"(?:{KEYS}|{_CHOICE_NOUN})(?:\s+(?:choice|option|letter))?{_ADJECTIVES}{_TO_WHAT}"
    rf"(?:,\s*(?:then|therefore|thus|hence),)?\s*{_LINK_WORDS}{_ADVERBS}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?:\b(?i:I|we|I['’]?(?:ll|d)|let['’]?s|so|thus|hence|therefore),?\s+"
    r"(?:would\s+|will\s+|must\s+|should\s+|shall\s+|therefore\s+|thus\s+|finally\s+)*"
    r"(?:choose|chose|select|pick|go\s+with|opt\s+for|settle\s+on)|"
    r"\b(?i:I['’]?m|I\s+am)\s+(?:going|staying|sticking)\s+with|\b(?i:je\s+choisis|"
    r"(?:yo\s+)?elijo|ich\s+wähle|"
    r"ich\s+entscheide\s+mich\s+für|scelgo|(?:eu\s+)?escolho|ik\s+kies)(?:\s+(?:donc|daher|also|"
    r"dus))?|"
    r"(?:本题|本題|此题|此題)\s*(?:应|應)?(?:选择?|選擇?)(?!项|項|択)|"
    r"(?:应该?|應該?|故|因此|所以|我)\s*(?:选择?|選擇?)(?!项|項|択)|(?<![^\W])(?:选择?|選擇?)(?!项|項|択))\s*:?\s*"
)
_NAMED_CORRECT = re.compile(
    r"(?<![^\W_])(?P<lead>(?:options?|choice|answer|alternative)\s+)?[(\[]?"
    r"(?P<letter>[A-Z])[)\]]?\s+is\s+"
    r"(?:therefore\s+|thus\s+|hence\s+|clearly\s+|indeed\s+)?(?:the\s+)?"
    r"(?P<what>(?:correct|right|best|final)(?:\s+(?:answer|option|choice|one))?|"
    r"answer\s*(?=[.!]?$))"
    r"(?!\s+(?:only|if|when|for\s+the|in\s+that))\b",
    re.MULTILINE,
)
# The same in the card's other languages of this word order: "C est la bonne réponse".
_NAMED_ELSEWHERE = re.compile(
    r"(?<![^\W_])(?P<lead>(?i:antwort|option|opción|opzione|risposta|opção|alternativa|letra|"
    r"réponse|respuesta|resposta|antwoord|optie|proposition)\s+)?[(\[]?(?P<letter>[A-Z])[)\]]?\s+"
    r"(?:ist|est|es|è|é|is)\s+(?:also\s+|somit\s+|daher\s+|donc\s+|quindi\s+|portanto\s+|dus\s+)?"
    r"(?:(?:die|la|a|het|l['’])\s*)?"
    r"(?P<what>(?:richtige|korrekte|bonne|juiste|correcte)\s+(?i:antwort|option|réponse|"
    r"antwoord|optie|lösung)|"
    r"(?:réponse|respuesta|opción|risposta|opzione|resposta|opção|alternativa)\s+"
    r"(?:correcte|exacte|correcta|corretta|esatta|giusta|correta|certa)|"
    r"richtig|korrekt|correcte?|correcta|corretta|correta|juist)(?![^\W_])"
    r"(?!\s+(?:only|if|when|nur|wenn|falls|si|se|als|solo|seulement|apenas|alleen))"
)
_NOT_MEANT = re.compile(
    r"(?:\b(?:and|or|nor|not|if|whether|why|that|unless|suppose|neither|either)|[,&/])\s*$",
    re.IGNORECASE,
)
_LAST_LINE = re.compile(
    r"(?:(?:so|thus|therefore|hence|finally|ergo|in\s+conclusion|final|daher|donc|quindi|portanto|"
    r"dus|因此|所以|故)\b[\s,:]*)?(?:(?:question\s*)?\d{1,3}[.):]\s*)?"
    r"(?:(?:(?:it|that)(?:['’]s|\s+is|\s+must\s+be|\s+has\s+to\s+be|\s+leaves)|"
    r"c['’]est(?:\s+donc)?|richtig\s+ist)\s+)?"
    rf"(?:(?:the\s+)?(?:final\s+)?{KEYS}[\s,:]*)?"
    rf"(?:{_OPTION_WORD}\s*)?(?:[(\[{{<]\s*){{0,2}}(?P<letter>[A-Za-z])\s*[)\]}}>]{{0,2}}\s*[.!。]?",
    re.IGNORECASE,
)
_OPTION_LINE = re.compile(r"(?:[(\[]\s*(?P<a>[A-Z])\s*[)\]][.:]?|(?P<b>[A-Z])\s*[).:])[ \t]+\S.*")
_RETRACTED = re.compile(
    r"\b(?:wait|actually|no|sorry|correction|correcting|mistaken?|scratch|instead|however|but|hmm+|"
    r"oops|second\s+thought|re-?check(?:ing|ed)?|reconsider(?:ing|ed)?|hold\s+on|wrong|revised?|"
    r"warte|nein|attendez|non|espera|aspetta|wacht|等等|不对|待って|잠깐)(?![^\W_])|(?:等等|不对|待って|잠깐)",
    re.IGNORECASE,
)
_UNSAID = re.compile(
    r"\b(?:that|this|it)(?:['’]s|s|\s+is|\s+was|\s+must\s+be)\s+(?:wrong|incorrect|not\s+right|"
    r"not\s+correct|a\s+mistake|an\s+error)|\b(?:that|this|it)\s+(?:can['’]?t|cannot|"
    r"could(?:n['’]?t|\s+not))\s+be\s+"
    r"(?:right|correct|it)|\bI\s+(?:was|am)\s+(?:wrong|mistaken)",
    re.IGNORECASE,
)
_LOOSE = re.compile(
    r"\b(?:it|that|this|make\s+(?:it|that))(?:['’]?s)?\s*(?:is|was|should\s+be|must\s+be|"
    r"has\s+to\s+be|"
    r"would\s+be)?\s+(?:actually\s+|really\s+|rather\s+)?",
    re.IGNORECASE,
)
# "B... no, C.": a letter alone after the word that takes the first one back.
_INSTEAD = re.compile(
    r"\b(?:no|wait|sorry|rather|actually|make\s+that|I\s+mean)[\s,:]+(?:no[\s,:]+)?"
    r"(?=[(\[]?[A-Z][)\]]?\s*[.!]?\s*(?:$|\n))",
    re.IGNORECASE,
)
# "If friction were ignored, the answer would be B."
_SUPPOSED = re.compile(
    r"\bif\b[^.!?\n]*\bwould\s+be\b|\bwould\s+be\b[^.!?\n]*\bif\b", re.IGNORECASE
)
_CLAUSE = 120  # characters of a sentence that are looked at on either side
_TWO_BOXES = re.compile(
    rf"\\f?boxed\s*\{{([^{{}}]*)\}}[\s)\]]*(?:[,;、]|{_AND})?[\s(\[]*\\f?boxed\s*\{{([^{{}}]*)\}}"
)


@dataclass(frozen=True, slots=True)
class _Found:
    """A statement: where it stands in the text, and its letter or `SEVERAL`."""

    start: int
    end: int
    letter: str


def extract_letter(text: str, letters: str) -> str | None:
    """The option letter that a final answer states, or None.

    text     the final answer only, reasoning already removed
    letters  the valid letters of this item, such as "ABCD"

    Example: ``extract_letter("**Answer:** (b)", "ABCD") == "B"``;
    ``extract_letter("Answer: B, D", "ABCD") is None``.
    """
    bare = _ECHO.sub("", without_marks(text))
    formal = _after(bare, letters, FORMAL) + _after(bare, letters, HEADING)
    phrases = _phrases(bare, letters)
    found = max(formal, key=_place, default=None)
    if found is not None:
        found = _taken_back(bare, letters, found, phrases)
    found = found or _boxed(bare, letters) or _last_phrase(bare, phrases)
    found = found or _last_line(bare, letters)
    return None if found is None or found.letter == SEVERAL else found.letter


def grade_letter(gold: str, letters: str, text: str) -> Score:
    """Score an answer to a multiple-choice item by letter equality."""
    letter = extract_letter(text, letters)
    return unparsed() if letter is None else right_or_wrong(letter == gold.upper(), letter)


def _place(found: _Found) -> int:
    return found.start


def _after(text: str, letters: str, key: re.Pattern[str]) -> list[_Found]:
    """Statements right after every place where `key` matches."""
    found = (_choice(text, match.end(), letters, match.start()) for match in key.finditer(text))
    return [one for one in found if one is not None]


def _choice(
    text: str, position: int, letters: str, start: int, *, upper_only: bool = False
) -> _Found | None:
    """The statement that begins at a place: one letter, several of them, or nothing."""
    match = _CHOICE.match(text, position)
    if match is None:
        return None
    letter = match["letter"].upper()
    if letter not in letters or (upper_only and not match["letter"].isupper()):
        return None
    after = text[match.end("letter") : match.end("letter") + _AHEAD]
    if _GOES_ON.match(after) and not _CJK.match(after):
        return None
    tail = text[match.end() : match.end() + _AHEAD]
    if (others := _listed(letter, after, letters)) is not None:
        is_echo = others == letters[: len(others)] and len(others) >= min(3, len(letters))
        return None if is_echo else _Found(start, match.end(), SEVERAL)
    if _DENIED.match(tail) or (not match["close"] and _is_prose(tail, bool(match["open"].strip()))):
        return None
    return _Found(start, match.end(), letter)


def _listed(letter: str, after: str, letters: str) -> str | None:
    """All letters of a list such as "B and D", "B, D", "A/B/C/D"; None if there is but one."""
    others = letter
    is_apart = _LISTED.match(after) is not None and _JOINED.match(after) is None
    while match := (_JOINED.match(after) or _LISTED.match(after)):
        other = match.groupdict().get("bracketed") or match["other"]
        if other not in letters:
            break
        others += other
        after = after[match.end() :]
    if is_apart and _OTHERS_FAIL.match(after):
        return None
    if len(others) == 1:
        if _ROMAN.match(after):
            return letter + letter
        match = _SPACED.match(after)
        if match is None or match["other"] not in letters:
            return None
        others += match["other"]
    return others if len(set(others)) > 1 else None


def _is_prose(tail: str, is_opened: bool) -> bool:
    """Whether a bare letter goes on as a sentence: "A function of time", "I think"."""
    word = _WORD.match(tail)
    if word is None or is_opened:
        return False
    return word["word"][0].islower() and word["word"] not in _FOLLOWERS


def _boxed(text: str, letters: str) -> _Found | None:
    content = last_boxed(text)
    if content is None:
        return None
    if any(one.strip() != other.strip() for one, other in _TWO_BOXES.findall(text)):
        return _Found(0, 0, SEVERAL)
    inner = re.sub(r"\\(?=[{}])", "", re.sub(r"\\[,;:! ]|\\q?quad|~", " ", content)).strip()
    found = _choice(inner, 0, letters, 0)
    return found or max(_after(inner, letters, FORMAL), key=_place, default=None)


def _phrases(text: str, letters: str) -> list[_Found]:
    """Statements within sentences; upper case only, since "(b)" may name a question's part."""
    found: list[_Found | None] = []
    for match in (*_PHRASE.finditer(text), *_CHOSEN.finditer(text)):
        if not _is_supposed(text, match.start()):
            found.append(_choice(text, match.end(), letters, match.start(), upper_only=True))
    last_line = text.rstrip().rfind("\n")
    for match in (*_NAMED_CORRECT.finditer(text), *_NAMED_ELSEWHERE.finditer(text)):
        is_named = match["lead"] or " " in match["what"].strip()
        is_last = match.start() > last_line
        if match["letter"] not in letters or not (is_named or is_last):
            continue
        before = _NOT_MEANT.search(text[max(0, match.start() - 40) : match.start()])
        if before is None:
            found.append(_Found(match.start(), match.end(), match["letter"]))
        elif before[0].strip().lower() in ("and", "or", "&", "/"):
            found.append(_Found(match.start(), match.end(), SEVERAL))
    return [one for one in found if one is not None]


def _is_supposed(text: str, position: int) -> bool:
    """Whether the sentence at a place only says what would be true under another condition."""
    before = text[max(0, position - _CLAUSE) : position]
    after = text[position : position + _CLAUSE]
    sentence = re.split(r"[.!?\n]", before)[-1] + re.split(r"[.!?\n]", after, maxsplit=1)[0]
    # The plain search first: most sentences have no "would".
    return "would" in sentence and bool(_SUPPOSED.search(sentence))


def _last_line(text: str, letters: str) -> _Found | None:
    """A last line that is only a letter, or an option with its text: "(C) 42 m/s"."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip(_BULLETS)]
    if not lines:
        return None
    line = lines[-1].lstrip(_BULLETS)
    if match := _LAST_LINE.fullmatch(line):
        letter = match["letter"].upper()
        return _Found(0, 0, letter) if letter in letters else None
    if match := _OPTION_LINE.fullmatch(line):
        letter = match["a"] or match["b"]
        # The end of a list of options states none of them.
        is_list = len(lines) > 1 and _OPTION_LINE.fullmatch(lines[-2].lstrip(_BULLETS))
        if letter in letters and not is_list and not _DENIED.search(line):
            is_several = _listed(letter, line[match.end("a" if match["a"] else "b") :], letters)
            return _Found(0, 0, SEVERAL if is_several else letter)
    return None


def _taken_back(text: str, letters: str, formal: _Found, phrases: list[_Found]) -> _Found | None:
    """What a self-correction after the last "Answer: B" leaves of it.

    "Wait, the answer is C" replaces it; "Wait, that is wrong" leaves nothing.
    """
    rest = text[formal.end :]
    retracted = _RETRACTED.search(rest)
    if retracted is None:
        return formal
    start = formal.end + retracted.start()
    later = [one for one in phrases if one.start >= start]
    for match in (*_LOOSE.finditer(text, start), *_INSTEAD.finditer(text, start)):
        loose = _choice(text, match.end(), letters, match.start(), upper_only=True)
        if loose is not None:
            later.append(loose)
    if later:
        return max(later, key=_place)
    return _Found(start, start, SEVERAL) if _is_unsaid(rest, formal.letter) else formal


def _last_phrase(text: str, phrases: list[_Found]) -> _Found | None:
    """The last statement within sentences, unless the text takes it back."""
    last = max(phrases, key=_place, default=None)
    if last is None or not _RETRACTED.search(text, last.end):
        return last
    return (
        _Found(last.start, last.end, SEVERAL) if _is_unsaid(text[last.end :], last.letter) else last
    )


def _is_unsaid(rest: str, letter: str) -> bool:
    """Whether what follows a statement calls it wrong, and not another option that it discusses."""
    match = _UNSAID.search(rest)
    if match is None:
        return False
    sentence = re.split(r"[.!?\n]", rest[: match.start()])[-1]
    named = re.findall(r"(?<![^\W_])[A-Z](?![^\W_]|['’])", sentence)
    return all(other in (letter, "I") for other in named)
