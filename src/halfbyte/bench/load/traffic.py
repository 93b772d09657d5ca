"""What a run sends: levels of users, their sessions and turns, as sizes in tokens and seeds.

A `Trace` is the whole traffic of a run. The same seed and sizes give the same trace, and a trace is
a file (JSON) that another run, server or machine replays. It holds no text: a turn is so many
tokens of words drawn from its seed (`words`), so that prompts have their size under any tokenizer.

Profiles
fixed   users who ask at once, each prompt as long as the others and like none before
agents  sessions as coding agents have them: a system prompt with tools that all share, a task, then
        results of tools that the history grows by, a wait before each as the tool takes its time
beside  streams that run, then one long prompt beside them

Source of the agents' figures: coding agents on a 123B model sent 218 prompt tokens for each answer
token, nearly all found as prefixes (aarora79/agentic-coding-harness-benchmarks, issue 65).
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from halfbyte.errors import CapacityError, UsageError, in_words, shown
from halfbyte.files import parse_json_text, read_bounded

Profile = Literal["fixed", "agents", "beside"]
Role = Literal["user", "tool"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
# Sizes as they stand below are for servers whose context has room for these tokens.
FULL_CONTEXT = 65_536
LEAST_CONTEXT = 256
_FORMAT = "halfbyte load trace 1"
_MOST_TOKENS = 10_000_000
_MOST_USERS = 4096
_MOST_SEED = 1 << 63


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session, and the new text that it brings.

    wait_s         seconds between the answer before it and this request
    tokens, seed   the new text of the history: how long, and which words
    answer_tokens  how long the answer is to be
    """

    wait_s: float
    role: Role
    tokens: int
    seed: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation: its system prompt (none if it has no tokens), then its turns."""

    turns: tuple[Turn, ...]
    system_tokens: int = 0
    system_seed: int = 0
    has_tools: bool = False

    @property
    def peak_tokens(self) -> int:
        """Tokens of the last prompt and its answer."""
        return self.system_tokens + sum(turn.tokens + turn.answer_tokens for turn in self.turns)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests together, each of which sends the history again."""
        total, history = 0, self.system_tokens
        for turn in self.turns:
            history += turn.tokens
            total += history
            history += turn.answer_tokens
        return total


@dataclass(frozen=True, slots=True)
class Level:
    """What is measured as one: users at once, each with sessions one after another.

    beside  a session that begins when every user's answer runs; the level ends with its answer, and
            the users' sessions are asked again and again until then
    """

    profile: Profile
    users: tuple[tuple[Session, ...], ...]
    beside: Session | None = None

    @property
    def title(self) -> str:
        """The level in a few words: "fixed lengths, 8 users"."""
        count = len(self.users)
        many = "" if count == 1 else "s"
        return {
            "fixed": f"fixed lengths, {count} user{many}",
            "agents": f"{count} agent{many}",
            "beside": f"a long prompt beside {count} stream{many}",
        }[self.profile]

    @property
    def sessions(self) -> Iterator[Session]:
        """The sessions of all users, and of what runs beside them."""
        for user in self.users:
            yield from user
        if self.beside is not None:
            yield self.beside

    @property
    def num_requests(self) -> int:
        """Number of requests of all users, the long one included if there is one."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that all answers together are asked for."""
        return sum(turn.answer_tokens for one in self.sessions for turn in one.turns)

    @property
    def prompt_per_answer(self) -> float:
        """Number of prompt tokens that are sent for each token of an answer."""
        return sum(session.prompt_tokens for session in self.sessions) / self.answer_tokens


@dataclass(frozen=True, slots=True)
class Trace:
    """The traffic of a run; `cut` says what was made smaller than usual, and why."""

    seed: int
    levels: tuple[Level, ...]
    cut: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A hash of what is sent: two runs with the same one measured the same traffic."""
        told = json.dumps([asdict(level) for level in self.levels], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TrafficSizes:
    """How much of everything; ranges are drawn from so that each doubling is as likely.

    users, agents  levels of the profiles `fixed` and `agents`
    requests       of each user of a fixed level, one after another
    turns          of an agent's session
    streams        that run beside the long prompt
    """

    users: tuple[int, ...] = (1, 8, 32, 64)
    prompt_tokens: int = 1024
    answer_tokens: int = 128
    requests: int = 3
    agents: tuple[int, ...] = (1, 4, 16)
    turns: int = 12
    system_tokens: int = 6000
    task_tokens: tuple[int, int] = (200, 800)
    result_tokens: tuple[int, int] = (500, 8000)
    agent_answer_tokens: tuple[int, int] = (50, 400)
    wait_s: tuple[float, float] = (0.3, 10.0)
    streams: int = 8
    stream_tokens: int = 256
    long_tokens: int = 32_000
    profiles: tuple[Profile, ...] = PROFILES


# Room for words that are not quite the tokens they should be.
_MARGIN = 0.05


def make_trace(seed: int, sizes: TrafficSizes, context_tokens: int | None) -> Trace:
    """The traffic of these sizes, made to fit a context.

    context_tokens  most tokens of a prompt and its answer; None if the server does not say it, and
                    then nothing is cut

    Raises CapacityError if the context is smaller than any measurement makes sense with, UsageError
    for a seed that no file of ours could hold.
    """
    if abs(seed) > _MOST_SEED:
        raise UsageError(f"the seed {shown(seed)} is too large; {_MOST_SEED} is the most")
    room = FULL_CONTEXT
    if context_tokens is not None:
        if context_tokens < LEAST_CONTEXT:
            raise CapacityError(
                f"the context is {context_tokens} tokens; a measurement under load needs "
                f"{LEAST_CONTEXT} at least"
            )
        room = int(context_tokens * (1 - _MARGIN)) - 16
    dice = random.Random(seed)
    levels: list[Level] = []
    cut: list[str] = []
    makers = {"fixed": _fixed, "agents": _agents, "beside": _beside}
    for profile in sizes.profiles:
        levels += makers[profile](dice, sizes, room, cut)
    if cut:
        cut = [f"{words}, for a context of {context_tokens:,} tokens" for words in cut]
    return Trace(seed, tuple(levels), tuple(cut))


def _fixed(dice: random.Random, sizes: TrafficSizes, room: int, cut: list[str]) -> list[Level]:
    asked, answer = sizes.prompt_tokens, sizes.answer_tokens
    if asked + answer > room:
        part = room / (asked + answer)
        asked, answer = max(int(asked * part), 1), max(int(answer * part), 1)
        cut.append(
            f"fixed: prompts of {asked:,} tokens instead of {sizes.prompt_tokens:,}, answers of "
            f"{answer:,} instead of {sizes.answer_tokens:,}"
        )

    def session() -> Session:
        return Session((Turn(0.0, "user", asked, _seed(dice), answer),))

    return [
        Level("fixed", tuple(tuple(session() for _ in range(sizes.requests)) for _ in range(users)))
        for users in sizes.users
    ]


def _agents(dice: random.Random, sizes: TrafficSizes, room: int, cut: list[str]) -> list[Level]:
    part = min(1.0, room / (FULL_CONTEXT * (1 - _MARGIN) - 1024))
    if part < 1:
        cut.append(f"agents: system prompt, results and answers made {part:.2g} times as long")
    system, system_seed = max(int(sizes.system_tokens * part), 16), _seed(dice)

    def drawn(bounds: tuple[int, int], least: int) -> int:
        low, high = bounds
        return max(round(_log_uniform(dice, low, high) * part), least)

    def session() -> Session:
        """Redrawn until as much is read for an answer as agents read."""
        for _ in range(20):
            found = drawn_session()
            answers = sum(turn.answer_tokens for turn in found.turns)
            if 50 <= found.prompt_tokens / max(answers, 1) <= 200:
                break
        return found

    def drawn_session() -> Session:
        turns: list[Turn] = []
        held = system
        for number in range(sizes.turns):
            wait = 0.0 if number == 0 else round(_log_uniform(dice, *sizes.wait_s), 3)
            tokens = drawn(sizes.result_tokens if number else sizes.task_tokens, 16)
            answer = drawn(sizes.agent_answer_tokens, 4)
            seed = _seed(dice)
            if held + tokens + answer > room:
                break  # the history is full, as it is for an agent
            turns.append(Turn(wait, "tool" if number else "user", tokens, seed, answer))
            held += tokens + answer
        return Session(tuple(turns), system, system_seed, has_tools=True)

    return [Level("agents", tuple((session(),) for _ in range(agents))) for agents in sizes.agents]


def _beside(dice: random.Random, sizes: TrafficSizes, room: int, cut: list[str]) -> list[Level]:
    answer = 16
    long = min(sizes.long_tokens, room - answer)
    if long < sizes.long_tokens:
        cut.append(f"beside: a prompt of {long:,} tokens instead of {sizes.long_tokens:,}")
    asked = min(sizes.stream_tokens, room // 4)
    # As long as may be: a stream that ends is asked again, with a new prompt to be read.
    runs = min(room - asked, 4096)
    streams = tuple(
        (Session((Turn(0.0, "user", asked, _seed(dice), runs),)),) for _ in range(sizes.streams)
    )
    return [Level("beside", streams, Session((Turn(0.0, "user", long, _seed(dice), answer),)))]


def _seed(dice: random.Random) -> int:
    return dice.randrange(1 << 32)


def _log_uniform(dice: random.Random, low: float, high: float) -> float:
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * dice.random())


def fitted(trace: Trace, context_tokens: int | None) -> Trace:
    """A trace as far as it fits: turns that a context has no room for are left out, and it is said.

    Raises CapacityError if the first turn of a session has no room.
    """
    if context_tokens is None:
        return trace
    room = context_tokens
    lost = 0

    def fit(session: Session) -> Session:
        nonlocal lost
        held, kept = session.system_tokens, 0
        for turn in session.turns:
            held += turn.tokens + turn.answer_tokens
            if held > room:
                break
            kept += 1
        if kept == 0:
            turn = session.turns[0]
            needs = session.system_tokens + turn.tokens + turn.answer_tokens
            raise CapacityError(
                f"the traffic needs a context of {needs:,} tokens and the server's has "
                f"{context_tokens:,}; leave --trace out and it is made to fit"
            )
        lost += len(session.turns) - kept
        return replace(session, turns=session.turns[:kept])

    levels = tuple(
        replace(
            level,
            users=tuple(tuple(fit(session) for session in user) for user in level.users),
            beside=None if level.beside is None else fit(level.beside),
        )
        for level in trace.levels
    )
    if not lost:
        return trace
    note = f"{lost} turns have no room in a context of {context_tokens:,} tokens and are left out"
    return replace(trace, levels=levels, cut=(*trace.cut, note))


# --- the file -------------------------------------------------------------------------------


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace; `read_trace` gives the same back."""
    told = {"format": _FORMAT, **asdict(trace)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, separators=(",", ":")) + "\n", encoding="utf-8")


def read_trace(path: Path) -> Trace:
    """The trace in a file; raises UsageError that names what is wrong in it."""
    try:
        found = parse_json_text(read_bounded(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a trace: {in_words(error)}") from error
    if not isinstance(found, Mapping) or found.get("format") != _FORMAT:
        raise UsageError(
            f"{path} is not a trace: its format is "
            f"{shown(found.get('format') if isinstance(found, Mapping) else None)}, not {_FORMAT!r}"
        )
    try:
        levels = tuple(
            _level(one, f"levels[{at}]") for at, one in enumerate(_list(found, "levels", ""))
        )
        cut = tuple(str(words) for words in _list(found, "cut", ""))
        return Trace(_whole(found, "seed", "", -_MOST_SEED, _MOST_SEED), levels, cut)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _level(found: object, where: str) -> Level:
    profile = _field(found, "profile", where)
    if profile not in PROFILES:
        raise ValueError(
            f"{where}.profile is {shown(profile)}; it must be one of {', '.join(PROFILES)}"
        )
    users = []
    for at, user in enumerate(_list(found, "users", where)):
        here = f"{where}.users[{at}]"
        if not isinstance(user, list) or not user:
            raise ValueError(f"{here} is {shown(user)}; it must be a list of sessions")
        users.append(tuple(_session(one, f"{here}[{n}]") for n, one in enumerate(user)))
    if not 1 <= len(users) <= _MOST_USERS:
        raise ValueError(f"{where}.users has {len(users)} users; 1 to {_MOST_USERS} are possible")
    beside = _field(found, "beside", where)
    if (beside is None) == (profile == "beside"):
        needs = "needs a session" if beside is None else "has none"
        raise ValueError(f"{where}.beside is {shown(beside)}; the profile {profile} {needs}")
    one = None if beside is None else _session(beside, f"{where}.beside")
    return Level(profile, tuple(users), one)


def _session(found: object, where: str) -> Session:
    turns = [
        _turn(one, f"{where}.turns[{at}]") for at, one in enumerate(_list(found, "turns", where))
    ]
    if not turns:
        raise ValueError(f"{where}.turns is empty; a session asks at least once")
    has_tools = _field(found, "has_tools", where)
    if not isinstance(has_tools, bool):
        raise ValueError(f"{where}.has_tools is {shown(has_tools)}; it must be true or false")
    return Session(
        tuple(turns),
        _whole(found, "system_tokens", where, 0),
        _whole(found, "system_seed", where, 0, _MOST_SEED),
        has_tools,
    )


def _turn(found: object, where: str) -> Turn:
    wait = _field(found, "wait_s", where)
    is_number = isinstance(wait, int | float) and not isinstance(wait, bool)
    if not is_number or not 0 <= wait <= 3600:
        raise ValueError(f"{where}.wait_s is {shown(wait)}; it must be a number of 0 to 3600")
    role = _field(found, "role", where)
    if role not in get_args(Role):
        raise ValueError(f"{where}.role is {shown(role)}; it must be user or tool")
    return Turn(
        float(wait),
        role,
        _whole(found, "tokens", where, 1),
        _whole(found, "seed", where, 0, _MOST_SEED),
        _whole(found, "answer_tokens", where, 1),
    )


def _field(found: object, name: str, where: str) -> Any:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is {shown(found)}; it must be an object")
    if name not in found:
        raise ValueError(f"{where or 'the trace'} lacks {name}")
    return found[name]


def _list(found: object, name: str, where: str) -> list[Any]:
    value = _field(found, name, where)
    if not isinstance(value, list):
        raise ValueError(f"{_path(where, name)} is {shown(value)}; it must be a list")
    return value


def _whole(found: object, name: str, where: str, least: int, most: int = _MOST_TOKENS) -> int:
    value = _field(found, name, where)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(
            f"{_path(where, name)} is {shown(value)}; it must be a whole number of {least} to "
            f"{most}"
        )
    return value


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
