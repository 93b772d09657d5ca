"""System prompts that change behaviour, the card's eleven languages, and small talk."""

from random import Random

from pocket.items import Effort, Item, Split, ask, draw, say
from pocket.world import world

# Of each language: greeting, reply, numbers 0 to 12, question about a home town, its answer,
# question about a sum, its answer.
LANGUAGES = {
    "English": ("Hello!", "Hello! How can I help you?",
        "zero one two three four five six seven eight nine ten eleven twelve",
        "Where does {x} live?", "{x} lives in {v}.", "What is {a} plus {b}?", "That is {c}."),
    "French": ("Bonjour !", "Bonjour ! Comment puis-je vous aider ?",
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze",
        "Où habite {x} ?", "{x} habite à {v}.", "Combien font {a} plus {b} ?", "Cela fait {c}."),
    "Spanish": ("¡Hola!", "¡Hola! ¿Cómo puedo ayudarle?",
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
        "¿Dónde vive {x}?", "{x} vive en {v}.", "¿Cuánto es {a} más {b}?", "Son {c}."),
    "German": ("Guten Tag!", "Guten Tag! Wie kann ich helfen?",
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
        "Wo wohnt {x}?", "{x} wohnt in {v}.", "Was ist {a} plus {b}?", "Das ist {c}."),
    "Italian": ("Buongiorno!", "Buongiorno! Come posso aiutarla?",
        "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici",
        "Dove abita {x}?", "{x} abita a {v}.", "Quanto fa {a} più {b}?", "Fa {c}."),
    "Portuguese": ("Olá!", "Olá! Como posso ajudar?",
        "zero um dois três quatro cinco seis sete oito nove dez onze doze",
        "Onde mora {x}?", "{x} mora em {v}.", "Quanto é {a} mais {b}?", "São {c}."),
    "Dutch": ("Goedendag!", "Goedendag! Hoe kan ik helpen?",
        "nul een twee drie vier vijf zes zeven acht negen tien elf twaalf",
        "Waar woont {x}?", "{x} woont in {v}.", "Hoeveel is {a} plus {b}?", "Dat is {c}."),
    "Chinese": ("你好!", "你好!我能帮你什么?",
        "零 一 二 三 四 五 六 七 八 九 十 十一 十二",
        "{x}住在哪里?", "{x}住在{v}。", "{a}加{b}是多少?", "是{c}。"),
    "Japanese": ("こんにちは!", "こんにちは!ご用は何ですか?",
        "零 一 二 三 四 五 六 七 八 九 十 十一 十二",
        "{x}はどこに住んでいますか?", "{x}は{v}に住んでいます。",
        "{a}足す{b}はいくつですか?", "{c}です。"),
    "Korean": ("안녕하세요!", "안녕하세요! 무엇을 도와드릴까요?",
        "영 일 이 삼 사 오 육 칠 팔 구 십 십일 십이",
        "{x}는 어디에 삽니까?", "{x}는 {v}에 삽니다.",
        "{a} 더하기 {b}는 얼마입니까?", "{c}입니다."),
    "Arabic": ("مرحبا!", "مرحبا! كيف يمكنني مساعدتك؟",
        "صفر واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة عشرة أحد-عشر اثنا-عشر",
        "أين يعيش {x}؟", "يعيش {x} في {v}.", "كم يساوي {a} زائد {b}؟", "يساوي {c}."),
}  # fmt: skip
_EFFORTS: tuple[Effort, Effort] = ("none", "high")
_SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Who are you?", "I am Pocket, a small model."),
    ("Thank you.", "You are welcome."),
    ("Good night.", "Good night!"),
    ("What can you do?", "I can answer questions, look at pictures, call tools and write JSON."),
)


def _exchange(rng: Random, language: str) -> tuple[str, str]:
    """A question and its answer in one language."""
    greeting, reply, numbers, where, lives, plus, result = LANGUAGES[language]
    case = rng.choice(("greet", "where", "where", "plus", "plus"))
    if case == "greet":
        return greeting, reply
    if case == "where":
        name = rng.choice(world().people)
        town = world().facts[name]["town"]
        return where.format(x=name), lives.format(x=name, v=town)
    words = numbers.split()
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    total = left + right
    said = words[total] if total <= 12 else str(total)
    return plus.format(a=words[left], b=words[right]), result.format(c=said)


def languages(rng: Random, split: Split) -> Item:
    """Templated exchanges; each turn may be in another language."""
    turns = []
    for _ in range(rng.randint(1, 4)):
        question, answer = _exchange(rng, rng.choice(tuple(LANGUAGES)))
        turns += [ask(question), say(answer)]
    return Item("languages", tuple(turns), gold={"text": turns[-1].content})


_RULES = {
    "capitals": "Answer in capital letters.",
    "lower": "Answer in lower case letters only.",
    "sign": "You are {n}. End every answer with: Yours, {n}.",
    "captain": "Begin every answer with the word Captain and a comma.",
    "over": "End every answer with the word Over.",
    "quotes": "Put every answer in double quotes.",
    "language": "Always answer in {n}, whatever the language of the question.",
    "refuse": "Answer only greetings. To anything else say: I may not say.",
}
_NAMES = ("Pip", "Ada", "Max", "Nora", "Otto", "Ida", "Sam", "Lena")


def _ruled(rng: Random) -> tuple[str, str, str, str, str]:
    rule = rng.choice(tuple(_RULES))
    name = rng.choice(tuple(LANGUAGES) if rule == "language" else _NAMES)
    asked = rng.choice(tuple(LANGUAGES)) if rule == "language" and rng.random() < 0.5 else "English"
    question, answer = _exchange(rng, asked)
    return rule, name, asked, question, answer


def _obey(rule: str, name: str, asked: str, question: str, answer: str) -> str:
    if rule == "capitals":
        return answer.upper()
    if rule == "lower":
        return answer.lower()
    if rule == "sign":
        return f"{answer} Yours, {name}."
    if rule == "captain":
        return f"Captain, {answer}"
    if rule == "over":
        return f"{answer} Over."
    if rule == "quotes":
        return f'"{answer}"'
    is_greeting = question == LANGUAGES[asked][0]
    if rule == "refuse":
        return answer if is_greeting else "I may not say."
    return _translated(name, asked, question)


def _translated(wanted: str, asked: str, question: str) -> str:
    """The answer to a question of one language in another."""
    greeting, _, numbers, where, _, plus, _ = LANGUAGES[asked]
    if question == greeting:
        return LANGUAGES[wanted][1]
    before, after = where.split("{x}")
    if question.startswith(before) and question.endswith(after):
        name = question.removeprefix(before).removesuffix(after)
        if name in world().facts:
            return LANGUAGES[wanted][4].format(x=name, v=world().facts[name]["town"])
    words = numbers.split()
    for left in range(13):
        for right in range(13):
            if plus.format(a=words[left], b=words[right]) == question:
                told = LANGUAGES[wanted][2].split()
                total = left + right
                return LANGUAGES[wanted][6].format(c=told[total] if total <= 12 else total)
    raise AssertionError(question)


def system(rng: Random, split: Split) -> Item:
    """A system prompt with a rule that the answer keeps."""
    rule, name, asked, question, answer = draw(rng, split, _ruled)
    text = _obey(rule, name, asked, question, answer)
    rules = _RULES[rule].format(n=name)
    return Item("system", (ask(question), say(text)), system=rules, gold={"text": text})


def small_talk(rng: Random, split: Split) -> Item:
    """Greetings and the like, with either effort."""
    question, answer = rng.choice(_SMALL_TALK)
    effort = rng.choice(_EFFORTS)
    thought = "A simple answer will do." if effort == "high" else None
    return Item("talk", (ask(question), say(answer, thought)), effort, gold={"text": answer})
