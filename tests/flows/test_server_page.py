"""The chat page in a real browser, over the real server, chat format and a scripted engine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.browser import CHROMIUM, Browser
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.request import GenerationRequest
from halfbyte.server.app import create_app
from halfbyte.server.config import ServerConfig
from halfbyte.server.run import serving
from halfbyte.server.supervise import Supervisor
from server.scripted import ScriptedService

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="needs Chromium (apt-get install chromium); make check has no way to it",
)

DATA = Path(__file__).parent.parent / "data" / "chat"
THINK, END_THINK, CALLS, ARGS, EOS = 34, 35, 9, 32, 2
ENTER = ("Enter", 13, "\r")
Say = Callable[..., None]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService(lambda request: ())


@pytest.fixture
def say(browser: Browser, service: ScriptedService) -> Iterator[Say]:
    """Open the page on a server whose engine says what the test gives."""
    chat = load_chat(DATA / "tekken")
    config = ServerConfig(("tiny",), 4096, 800)
    app = create_app(Supervisor(service, lambda: service), chat, config, access_log=None)

    def set_script(*parts: str | int) -> None:
        ids = [
            i
            for part in parts
            for i in ([part] if isinstance(part, int) else chat.vocabulary.encode_text(part))
        ]

        def script(request: GenerationRequest) -> list[int]:
            return ids

        service.script = script

    with serving(app) as url:
        browser.errors.clear()
        browser.open(url + "/")
        browser.until("document.getElementById('model').textContent.includes('tiny')")
        browser.run("localStorage.clear()")
        yield set_script
        browser.open("about:blank#done")
    assert not browser.errors


def ask(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('input').focus()")
    browser.type(text)
    browser.press(*ENTER)


def done(browser: Browser, answers: int) -> None:
    browser.until(
        f"document.querySelectorAll('article.assistant').length === {answers} && "
        "document.getElementById('stop').hidden && "
        "document.querySelector('article.assistant:last-child .meta').textContent !== ''"
    )


LAST = "document.querySelector('article.assistant:last-of-type')"


def test_answer_is_shown_safely_with_counts(browser: Browser, say: Say) -> None:
    text = "Hi <img src=x onerror=alert(1)> **bold** `code`\n```py\nx < 1\n```\nend é"
    say(text, EOS)
    ask(browser, "<b>Hello</b>")
    done(browser, 1)
    assert browser.run("document.querySelector('article.user .text').textContent") == "<b>Hello</b>"
    assert browser.run(f"{LAST}.querySelectorAll('img, b').length") == 0
    assert "<img src=x" in browser.run(f"{LAST}.textContent")
    assert browser.run(f"{LAST}.querySelector('strong').textContent") == "bold"
    assert browser.run(f"{LAST}.querySelector('pre').textContent") == "x < 1\n"
    meta = browser.run(f"{LAST}.querySelector('.meta').textContent")
    assert "cached" in meta and "tokens/s" in meta


MARKDOWN = """# Title

Text with `a<b`, **bold `code`**, *emphasis* and 2 * 3 * 4, [link](https://example.com/a?b=1),
[trap](javascript:alert(1)) and <script>alert(1)</script>.

1. one
   - inner

   more of one
2. two

- [ ] other list
> quote
> - in a quote

| a | b |
|---|:-:|
| 1 | 2 |

---
```py
x < 1

```
"""


def test_markdown_is_drawn_and_nothing_in_it_runs(browser: Browser, say: Say) -> None:
    say("x", EOS)
    source = json.dumps(MARKDOWN)
    browser.run(f"""(async () => {{
      const {{ markdown }} = await import("/web/markdown.js");
      window.drawn = document.createElement("div");
      drawn.append(...markdown({source}));
    }})()""")

    def texts(selector: str) -> Any:
        return browser.run(f"[...drawn.querySelectorAll('{selector}')].map((n) => n.textContent)")

    assert texts("h3") == ["Title"] and texts("em") == ["emphasis"]
    assert texts("strong") == ["bold code"] and texts("p code") == ["a<b", "code"]
    assert texts("a") == ["link"] and texts("script, input") == []
    trap = "[trap](javascript:alert(1)) and <script>alert(1)</script>."
    assert trap in browser.run("drawn.textContent") and "2 * 3 * 4" in texts("p")[0]
    assert len(texts("ol > li")) == 2 and texts("ol > li ul > li") == ["inner"]
    assert texts("blockquote li") == ["in a quote"] and texts("td") == ["1", "2"]
    assert texts("pre") == ["x < 1\n\n"] and len(texts("hr")) == 1
    assert browser.run("drawn.querySelector('a').rel") == "noopener noreferrer"


def test_unfinished_and_hostile_markdown_is_drawn_at_once(browser: Browser, say: Say) -> None:
    """What streams in is cut anywhere; what a model writes may be built to take long."""
    say("x", EOS)
    hostile = ["*" * 5000, "`" * 5000, "> " * 3000, "[" * 5000, "|" * 5000 + "\n" + "|-" * 2000]
    hostile += ["- " * 2000, "\n".join(" " * i + "- x" for i in range(400)), "**a" * 3000]
    hostile += ["- - - - -x", "a\n" * 5000, "```\n" * 2001, "1. a\n\n" * 1500]
    texts = json.dumps([MARKDOWN[:i] for i in range(len(MARKDOWN))] + hostile)
    slowest = browser.run(f"""(async () => {{
      const {{ markdown }} = await import("/web/markdown.js");
      let slowest = 0;
      for (const text of {texts}) {{
        const begun = performance.now();
        markdown(text);
        slowest = Math.max(slowest, performance.now() - begun);
      }}
      return slowest;
    }})()""")
    assert slowest < 1000


def test_thought_is_folded_and_effort_is_sent(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say(THINK, "deep", END_THINK, "Done.", EOS)
    browser.run("document.getElementById('effort').value = 'high'")
    ask(browser, "Think")
    done(browser, 1)
    assert browser.run(f"{LAST}.querySelector('details').open") is False
    assert browser.run(f"{LAST}.querySelector('details div').textContent") == "deep"
    assert browser.run(f"{LAST}.querySelector('.text').textContent") == "Done."
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids)
    assert '"high"' in prompt


def test_stop_keeps_what_came_and_again_replaces_it(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say("one two three", EOS)
    service.hang_at = 2
    ask(browser, "Count")
    browser.until(f"{LAST} && {LAST}.querySelector('.text').textContent !== ''")
    browser.press("Escape", 27)
    done(browser, 1)
    assert "stopped" in browser.run(f"{LAST}.querySelector('.meta').textContent")
    service.hang_at = None
    browser.run(f"{LAST}.querySelector('button.again').click()")
    done(browser, 1)
    assert browser.run(f"{LAST}.querySelector('.text').textContent") == "one two three"
    assert not service.running and len(service.aborted) == 1


def test_tool_call_is_shown_and_its_result_goes_back(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say(CALLS, "f", ARGS, '{"a": 1}', EOS)
    tools = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]'
    browser.run(f"document.getElementById('tools').value = `{tools}`")
    ask(browser, "Call")
    done(browser, 1)
    assert browser.run(f"{LAST}.querySelector('.call strong').textContent") == "f"
    assert '"a": 1' in browser.run(f"{LAST}.querySelector('.call pre').textContent")
    say("It is 21.", EOS)
    browser.until("document.activeElement.placeholder === 'Result of f'")
    browser.type("21")
    browser.press(*ENTER)
    done(browser, 2)
    assert browser.run(f"{LAST}.querySelector('.text').textContent") == "It is 21."
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids, keep_control=True)
    assert prompt.endswith('[TOOL_CALLS]f[ARGS]{"a": 1}</s>[TOOL_RESULTS]21[/TOOL_RESULTS]')


def test_dropped_image_is_sent(browser: Browser, say: Say, service: ScriptedService) -> None:
    say("A square.", EOS)
    browser.run(
        """(async () => {
          const canvas = new OffscreenCanvas(60, 40);
          canvas.getContext("2d").fillRect(0, 0, 60, 40);
          const blob = await canvas.convertToBlob({ type: "image/png" });
          const data = new DataTransfer();
          data.items.add(new File([blob], "a.png", { type: "image/png" }));
          document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        })()"""
    )
    browser.until("document.querySelectorAll('#images img').length === 1")
    ask(browser, "What?")
    done(browser, 1)
    assert service.requests[-1].images[0].pixels.shape == (3, 56, 84)
    assert browser.run("document.querySelectorAll('article.user img').length") == 1


def test_errors_are_said_and_the_keyboard_works(browser: Browser, say: Say) -> None:
    say("x", EOS)
    browser.press(",", 188, modifiers=2)
    assert browser.run("document.getElementById('settings').hidden") is False
    browser.run("document.getElementById('temperature').value = '9'")
    ask(browser, "Hot")
    browser.until("document.querySelector('article.assistant .error') !== null")
    assert "temperature" in browser.run("document.querySelector('.error').textContent")
    # The refused request is in the console too; it is the only error there.
    assert all("400" in error for error in browser.errors)
    browser.errors.clear()
    browser.press("O", 79, modifiers=10)
    assert browser.run("document.getElementById('log').childElementCount") == 0


def test_dark_and_light(browser: Browser, say: Say) -> None:
    def back() -> str:
        return str(browser.run("getComputedStyle(document.body).backgroundColor"))

    first = back()
    browser.run("document.getElementById('theme').click()")
    assert back() != first
    browser.run("document.getElementById('theme').click()")
    assert back() == first
