"""What the graders share: a final answer's text without its dress, and the words that state one.

An answer may wear Markdown, LaTeX, HTML or JSON, full-width or Arabic-Indic digits, and may be in
any of the eleven languages of the model's card. `without_marks` takes the dress off; `FORMAL` finds
the places where an answer is given in the demanded form ("Answer: ..."). Which letter or number
stands there is decided by `letters` and `numbers`.
"""

import html
import re
import unicodedata

# Words for "answer" as they stand before a colon: English, French, Spanish, German, Italian,
# Portuguese, Dutch, Chinese, Japanese, Korean, Arabic.
KEYS = (
    r"(?:(?<![^\W_])(?:answers?|ans\.?|réponses?|reponses?|respuestas?|antwort(?:en)?|lösung|"
    r"risposta|risposte|respostas?|antwoord(?:en)?)(?![^\W_])|答案|答え|解答|回答|正解|答|정답|"
    r"답안|답변|답|الحل|الإجابة|الاجابة|إجابة|اجابة|الجواب|جواب)"
)
# What may stand between the word and the colon: "Answer (final):", "Answer choice:",
# "الإجابة الصحيحة:".
_BETWEEN = (
    r"(?:\s*\([^()\n]{0,24}\)|[ \t]+(?:choice|option|letter|number|value|finale?|correcte?|"
    r"correct[ao]|corretta|richtig|juste|exacte|الصحيحة|الصحيح|النهائية|النهائي))?"
)
LINK = r"(?:】\s*:?|:=?|={1,3}>?|[-=]>|→|⇒|➡|➜|➝|➤|\.\.\.|\||[-–—](?=\s))"
FORMAL = re.compile(rf"{KEYS}{_BETWEEN}\s*{LINK}[ \t]*\n?[ \t\n]*", re.IGNORECASE)
# A heading that is the word alone, its answer on the next line.
HEADING = re.compile(
    rf"^[ \t#]*(?:the\s+)?(?:final\s+|correct\s+)?{KEYS}[ \t]*\n\s*", re.IGNORECASE | re.MULTILINE
)

_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]{2,8});", re.IGNORECASE)
_MARKED = re.compile(r"(?<![=<>!:])==(?=\S)([^=\n]+)(?<=\S)==(?!=)")
# A full-width bracket opens a remark, where "C(" would be a function's call or "C(s)".
_REMARK_BRACKETS = {0xFF08: " ("}
_STRUCK = re.compile(r"~~[^~\n]*~~|<(?:s|del|strike)>.*?</(?:s|del|strike)>", re.IGNORECASE)
_ANSWER_TAG = re.compile(
    r"<(?:final[-_ ]?)?(?:answer|choice|option|solution|response)(?:\s[^<>]*)?>", re.IGNORECASE
)
_CONTROL_TOKEN = re.compile(r"<\|[a-z_]{2,20}\|>|</?s>\s*$", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][a-z0-9_-]+(?:\s[^<>]*)?/?>", re.IGNORECASE)
# Tags of one letter only in pairs: "<B>" alone is an option in angle brackets.
_SHORT_TAG = re.compile(r"<([bipqu])>([^<>]*)</\1>", re.IGNORECASE)
_SNAKE = re.compile(r"(?<=[a-z])_(?=[a-z])")
_ITALICS = re.compile(r"(?<![a-z0-9À-ɏ_])_+|_+(?![a-z0-9À-ɏ_])", re.IGNORECASE)
_QUOTES = re.compile(
    r"[\"“”„‟«»「」『』‹›`´*$\ufeff\u200b-\u200d\u2060]|(?<![a-zÀ-ɏ])['’‘]|['’‘](?![a-zÀ-ɏ])",
    re.IGNORECASE,
)
_MATH_MARKS = re.compile(r"\\[()\[\]]")
_LATEX_WRAPPER = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|tt|sc|up|normal)?|math(?:rm|bf|sf|it|tt|bb|cal|frak|normal)|"
    r"operatorname\*?|emph|underline|boldsymbol|bm|mbox|hbox|ensuremath)\s*\{([^{}]*)\}"
)
_LATEX_COLOUR = re.compile(
    r"\\(?:textcolor|colorbox)(?:\[[^\]]*\])?\s*\{[^{}]*\}\s*\{([^{}]*)\}|"
    r"\\color(?:\[[^\]]*\])?\s*\{[^{}]*\}"
)
_DOUBLE_BRACES = re.compile(r"\{\{([^{}]*)\}\}")
# Keys of JSON objects that hold the answer under another name.
_JSON_KEY = re.compile(
    r"[\"'](?:(?:final|correct|selected)?[ _]?(?:choice|option|letter|result)|prediction)[\"']\s*:",
    re.IGNORECASE,
)
_LATEX_SWITCH = re.compile(
    r"\\(?:bfseries|itshape|bf|rm|it|sf|tt|displaystyle|textstyle|large|Large|LARGE|huge|Huge|"
    r"normalsize|hfill|blacksquare|checkmark|left|right|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])"
)
# Letters in black circles and squares, which no normal form turns into letters.
_BADGES = {
    **{0x1F150 + i: chr(65 + i) for i in range(26)},
    **{0x1F170 + i: chr(65 + i) for i in range(26)},
    **{0x1F1E6 + i: chr(65 + i) for i in range(26)},
    0x2212: "-",
    0x066B: ".",
    0x066C: ",",
    0x061B: ";",
    0x060C: ",",
}


def without_marks(text: str) -> str:
    r"""The text without marks that do not change what it says.

    Bold, back-ticks, quotes, dollars, tags, LaTeX fonts and colours go; forms of one character
    become that character (full-width, bold mathematics, circled; decimal digits of every script).
    Struck-out text is no longer said.

    Example: ``without_marks("**Answer**： “Ｃ”") == "Answer: C"``.
    """
    bare = _CONTROL_TOKEN.sub("", text)
    bare = _ENTITY.sub(lambda match: html.unescape(match[0]), bare).translate(_REMARK_BRACKETS)
    bare = _JSON_KEY.sub("\nAnswer:", _MARKED.sub(r"\1", _STRUCK.sub("", bare)))
    bare = unicodedata.normalize("NFKC", bare.translate(_BADGES))
    bare = "".join(_ascii_digit(c) for c in bare) if not bare.isascii() else bare
    bare = _SHORT_TAG.sub(r"\2", _TAG.sub("", _ANSWER_TAG.sub("\nAnswer: ", bare)))
    bare = _MATH_MARKS.sub("", _ITALICS.sub("", _SNAKE.sub(" ", bare)))
    bare = _QUOTES.sub("", bare.replace("\\$", ""))
    for _ in range(4):  # fonts within colours within fonts
        before = bare
        bare = _LATEX_WRAPPER.sub(r"\1", _LATEX_COLOUR.sub(r"\1", bare))
        bare = _DOUBLE_BRACES.sub(r"{\1}", bare)
        if bare == before:
            break
    return _LATEX_SWITCH.sub("", bare)


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s{}$\\.,;]+)")


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed box that holds something; braces are counted.

    ``\boxed 7`` (no braces) boxes one word. An escaped brace is text, a brace after a line break
    (``\\``) is not escaped.
    """
    closings = _closings(text)
    for match in reversed(list(_BOX.finditer(text))):
        if match[1] != "{":
            return match[1]
        end = closings.get(match.end() - 1)
        if end is not None and text[match.end() : end].strip():
            return text[match.end() : end]
    return None


def _closings(text: str) -> dict[int, int]:
    """Place of every closed brace -> place of the one that closes it."""
    found: dict[int, int] = {}
    stack: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            found[stack.pop()] = match.start()
    return found
