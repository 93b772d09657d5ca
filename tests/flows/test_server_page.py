"""The chat page in a real browser, over the real server, chat format and a scripted engine."""

import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.browser import CHROMIUM, Browser
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.request import GenerationRequest
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.run import serving
from server.scripted import ScriptedService

if CHROMIUM is None:
    pytest.skip("needs Chromium (apt-get install chromium)", allow_module_level=True)

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
    with opened(browser, service, ServerConfig(("tiny",), 4096, 800)) as set_script:
        yield set_script


@contextlib.contextmanager
def opened(browser: Browser, service: ScriptedService, config: ServerConfig) -> Iterator[Say]:
    """The page on a server; errors in its console fail the test."""
    chat = load_chat(DATA / "tekken")
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
        browser.until("document.getElementById('about').textContent.includes('tiny')")
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


# A checker of accessibility, where `make clients` has brought it.
AXE = Path(os.environ.get("HALFBYTE_AXE", "build/clients/node_modules/axe-core/axe.min.js"))


def serious_faults(browser: Browser) -> list[str]:
    if not AXE.is_file():
        return []
    browser.run(AXE.read_text(encoding="utf-8") + "; 0")
    found = browser.run("""axe.run().then((result) => result.violations
      .filter((one) => ["serious", "critical"].includes(one.impact))
      .map((one) => `${one.id}: ${one.help}: ${one.nodes[0].html.slice(0, 200)}`))""")
    return list(found)


LAST = "document.querySelector('article.assistant:last-of-type')"


def test_answer_is_shown_safely_with_counts(browser: Browser, say: Say) -> None:
    text = "Hi <img src=x onerror=alert(1)> **bold** `code`\n```py\nx < 1\n```\nend é"
    say(text, EOS)
    ask(browser, "<b>Hello</b>")
    done(browser, 1)
    assert browser.run("document.querySelector('article.user .text').textContent") == "<b>Hello</b>"
    assert browser.run(f"{LAST}.querySelectorAll('img, b').length") == 0
    assert "<img src=x" in browser.run(f"{LAST}.textContent")
    browser.until(f"{LAST}.querySelector('strong') !== null")
    assert browser.run(f"{LAST}.querySelector('strong').textContent") == "bold"
    browser.until(f"{LAST}.querySelector('pre') !== null")
    assert browser.run(f"{LAST}.querySelector('pre').textContent") == "x < 1\n"
    meta = browser.run(f"{LAST}.querySelector('.meta').textContent")
    assert "cached" in meta and "tokens/s" in meta


MARKDOWN = r"""# Title

Text with `a<b`, **bold `code`**, *emphasis*, ~~gone~~, [link](https://example.com/a?b=1),
[trap](javascript:alert(1)) and <script>alert(1)</script>. See https://example.org too.

The sum is $a_1 + b^2$ and \\(c\\).

$$\\int_0^1 x\\,dx$$

1. one

   more of one
2. two

- [x] done
- [ ] open

> quote

| a | b |
|---|--:|
| 1 | 2 |

```py
x = 1 < 2

y = 3
```

שלום

end"""


def test_markdown_is_drawn_and_nothing_in_it_runs(browser: Browser, say: Say) -> None:
    say(MARKDOWN.replace("\\\\", "\\"), EOS)
    ask(browser, "Write")
    done(browser, 1)

    def texts(selector: str) -> Any:
        found = f"[...{LAST}.querySelectorAll('.text {selector}')].map((n) => n.textContent)"
        return browser.run(found)

    browser.until(f"{LAST}.querySelectorAll('.text td').length === 2")
    assert texts("h1") == ["Title"] and texts("em") == ["emphasis"] and texts("s") == ["gone"]
    assert texts("strong") == ["bold code"] and texts("p code") == ["a<b", "code"]
    assert texts("a") == ["link", "https://example.org"] and texts("script") == []
    shown = browser.run(f"{LAST}.textContent")
    assert "[trap](javascript:alert(1)) and <script>alert(1)</script>." in shown
    assert len(texts("math")) == 3 and len(texts("math[display=block]")) == 1
    assert len(texts("ol > li")) == 2 and len(texts("input[type=checkbox]:disabled")) == 2
    assert texts("td.right") == ["2"] and texts("blockquote")[0].strip() == "quote"
    assert texts("pre") == ["x = 1 < 2\n\ny = 3\n"] and len(texts("pre span")) > 3
    assert browser.run(f"{LAST}.querySelector('a').rel").startswith("noopener")
    # Right to left where the text is: by its first strong letter.
    assert (
        browser.run(
            f"getComputedStyle([...{LAST}.querySelectorAll('p')].find("
            "(p) => p.textContent.includes('\u05e9'))).direction"
        )
        == "rtl"
    )


def test_blocks_are_split_where_nothing_is_torn(browser: Browser, say: Say) -> None:
    """However an answer was cut on its way, its blocks are the same, and all of it is there."""
    say("x", EOS)
    cases = json.dumps(
        [MARKDOWN, "a\n\n```\nb\n\nc\n```\n\nd", "$$\na\n\nb\n$$\n\nc", "- a\n\n  b\n\nc"]
    )
    found = browser.run(f"""(async () => {{
      const {{ splitBlocks }} = await import("/web/text.js");
      return {cases}.map((text) => {{
        const {{ blocks, rest }} = splitBlocks(text);
        return [blocks.join("") + rest === text, blocks.length];
      }});
    }})()""")
    assert all(is_whole for is_whole, _ in found)
    assert [count for _, count in found][1:] == [2, 1, 0]


def test_what_is_marked_stays_while_an_answer_grows(browser: Browser, say: Say) -> None:
    say("one two\n\nthree four\n\nfive", EOS)
    browser.run("window.slow = true")
    ask(browser, "Count")
    browser.until(f"{LAST} && {LAST}.textContent.includes('one')")
    browser.run(f"""(() => {{
      const range = document.createRange();
      range.setStart({LAST}.querySelector('.text'), 0);
      range.setEndAfter({LAST}.querySelector('.text').lastChild);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
    }})()""")
    marked = browser.run("getSelection().toString().trim()")
    browser.until("document.getElementById('stop').hidden")
    assert marked and browser.run("getSelection().toString()").strip().startswith(marked[:3])
    browser.run("getSelection().removeAllRanges()")
    browser.until(f"{LAST}.querySelectorAll('.text p').length === 3")
    assert browser.run(
        f"{LAST}.querySelector('.text').textContent.replace(/\\s+/g, ' ').trim()"
    ) == ("one two three four five")


def test_reload_keeps_conversation_and_settings(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say("**first**", EOS)
    browser.run("document.getElementById('system').value = 'Be kind.'")
    browser.run("document.getElementById('system').dispatchEvent(new Event('change'))")
    ask(browser, "Hello")
    done(browser, 1)
    browser.until("document.querySelectorAll('#conversations li').length === 1")
    url = browser.run("location.href")
    browser.open("about:blank#away")
    browser.open(url)
    browser.until("document.querySelectorAll('article').length === 2")
    browser.until(f"{LAST}.textContent.startsWith('first')")
    assert browser.run("document.getElementById('system').value") == "Be kind."
    ask(browser, "More")
    done(browser, 2)
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids, keep_control=True)
    assert "Be kind." in prompt and "[INST]Hello[/INST]**first**</s>[INST]More" in prompt


def test_conversations_are_renamed_exported_imported_and_deleted(
    browser: Browser, say: Say
) -> None:
    say("yes", EOS)
    ask(browser, "One")
    done(browser, 1)
    browser.run("document.getElementById('new').click()")
    ask(browser, "Two")
    done(browser, 1)
    browser.until("document.querySelectorAll('#conversations li').length === 2")
    browser.until("""(() => {
      const button = document.querySelector('#conversations li button:nth-of-type(2)');
      button?.click();
      return button !== null;
    })()""")
    browser.run("document.querySelector('#conversations input').value = 'Renamed'")
    # An answer that ends draws the list again: what is typed stays.
    ask(browser, "Three")
    done(browser, 2)
    browser.run("new Promise((resolve) => setTimeout(resolve, 200))")
    assert browser.run("document.querySelector('#conversations input').value") == "Renamed"
    browser.run("document.querySelector('#conversations form').requestSubmit()")
    browser.until("document.querySelector('#conversations').textContent.includes('Renamed')")
    text = browser.run("""(async () => {
      const store = await import("/web/store.js");
      return store.exportText(await store.list());
    })()""")
    assert len(json.loads(text)["conversations"]) == 2
    wrong = ["{", "{}", json.dumps({"format": "halfbyte-conversations-1", "conversations": [{}]})]
    for bad in wrong:
        said = browser.run(f"""(async () => {{
          const store = await import("/web/store.js");
          try {{ store.readExport({json.dumps(bad)}); return "taken"; }}
          catch (error) {{ return error.message; }}
        }})()""")
        assert said.startswith(("This file", "Conversation 1"))
    for _ in range(2):
        browser.run("document.querySelector('#conversations li button:nth-of-type(3)').click()")
        browser.run("document.querySelector('#conversations li button:nth-of-type(3)').click()")
        browser.run("new Promise((resolve) => setTimeout(resolve, 200))")
    browser.until("document.querySelectorAll('#conversations li').length === 0")
    count = browser.run(f"""(async () => {{
      const store = await import("/web/store.js");
      const found = store.readExport({json.dumps(text)});
      for (const one of found) await store.save(one);
      return (await store.list()).length;
    }})()""")
    assert count == 2


def test_a_message_is_changed_and_the_former_conversation_stays(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say("yes", EOS)
    ask(browser, "Frist")
    done(browser, 1)
    browser.run("document.querySelector('article.user .meta button').click()")
    browser.run("document.querySelector('.edit textarea').value = 'First'")
    browser.run("document.querySelector('form.edit').requestSubmit()")
    browser.until("document.querySelector('article.user .text')?.textContent === 'First'")
    done(browser, 1)
    browser.until("document.querySelectorAll('#conversations li').length === 2")
    assert "before the change" in browser.run("document.getElementById('list').textContent")
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids)
    assert "First" in prompt and "Frist" not in prompt


def test_copying_works_without_a_clipboard_interface(browser: Browser, say: Say) -> None:
    say("text to copy", EOS)
    ask(browser, "Hi")
    done(browser, 1)
    browser.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    browser.run("""document.addEventListener("copy", () => {
      window.copied = document.activeElement.value;
    })""")
    browser.run(f"[...{LAST}.querySelectorAll('.meta button')].at(-1).click()")
    browser.until("window.copied === 'text to copy'")
    browser.until(f"{LAST}.querySelector('.meta').textContent.match(/Copied|Not copied/)")


def test_an_unanswered_call_does_not_break_the_conversation(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say(CALLS, "f", ARGS, '{"a": 1}', EOS)
    tools = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]'
    browser.run(f"document.getElementById('tools').value = `{tools}`")
    ask(browser, "Call")
    done(browser, 1)
    say("Fine.", EOS)
    ask(browser, "Never mind")
    done(browser, 2)
    assert browser.run(f"{LAST}.querySelector('.text').textContent").strip() == "Fine."
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids, keep_control=True)
    assert prompt.endswith("[TOOL_RESULTS][/TOOL_RESULTS][INST]Never mind[/INST]")


def test_a_schema_in_the_settings_holds_the_answer(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    browser.run(f"document.getElementById('schema').value = `{schema}`")
    say('{"n": 4}', EOS)
    ask(browser, "How many?")
    done(browser, 1)
    assert service.requests[-1].rules is not None
    browser.run("document.getElementById('schema').value = '{'")
    ask(browser, "Again")
    browser.until("document.querySelector('[role=alert]') !== null")
    said = browser.run("document.querySelector('[role=alert]').textContent")
    assert "schema is not valid JSON" in said
    browser.run("document.getElementById('schema').value = ''")


def test_a_refused_message_goes_back_to_where_it_can_be_changed(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say("x", EOS)
    browser.run("document.getElementById('temperature').value = '9'")
    ask(browser, "Hot")
    browser.until("document.querySelector('[role=alert]') !== null")
    assert browser.run("document.getElementById('input').value") == "Hot"
    assert browser.run(
        "document.querySelector('[role=alert]').getBoundingClientRect().bottom <= innerHeight"
    )
    browser.run("document.getElementById('temperature').value = ''")
    browser.press(*ENTER)
    done(browser, 1)
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids)
    assert prompt.count("Hot") == 1
    browser.errors.clear()


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_sizes_and_screenshots(
    browser: Browser, say: Say, width: int, height: int, theme: str
) -> None:
    say(THINK, "hm", END_THINK, MARKDOWN.replace("\\\\", "\\"), EOS)
    browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=width < 600,
    )
    try:
        browser.run(f"document.documentElement.dataset.theme = '{theme}'")
        browser.run("document.getElementById('effort').value = 'high'")
        ask(browser, "Show everything")
        done(browser, 1)
        browser.until(f"{LAST}.querySelectorAll('.text td').length === 2")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        if width < 600:
            small = browser.run("""[...document.querySelectorAll("button, select, summary")]
              .filter((node) => node.offsetParent && node.getBoundingClientRect().height < 43.5)
              .map((node) => node.outerHTML.slice(0, 80))""")
            assert small == []
        for problem in serious_faults(browser):
            pytest.fail(problem)
        shot = browser.send("Page.captureScreenshot", format="png")["data"]
        folder = Path("build/screenshots")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"page-{width}-{theme}.png").write_bytes(base64.b64decode(shot))
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")


def test_every_control_has_a_name_and_the_keyboard_reaches_it(browser: Browser, say: Say) -> None:
    say("x", EOS)
    ask(browser, "Hi")
    done(browser, 1)
    nameless = browser.run("""[...document.querySelectorAll("button, input, select, textarea")]
      .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() ||
        node.closest("label")?.textContent.trim() || node.title))
      .map((node) => node.outerHTML)""")
    assert nameless == []
    unreachable = browser.run("""[...document.querySelectorAll("button, select, textarea")]
      .filter((node) => node.offsetParent && node.tabIndex < 0).map((node) => node.outerHTML)""")
    assert unreachable == []


def test_thought_is_folded_and_effort_is_sent(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    say(THINK, "deep", END_THINK, "Done.", EOS)
    browser.run("document.getElementById('effort').value = 'high'")
    ask(browser, "Think")
    done(browser, 1)
    assert browser.run(f"{LAST}.querySelector('details').open") is False
    assert browser.run(f"{LAST}.querySelector('details div').textContent").strip() == "deep"
    assert browser.run(f"{LAST}.querySelector('.text').textContent").strip() == "Done."
    chat = load_chat(DATA / "tekken")
    prompt = chat.vocabulary.decode(service.requests[-1].prompt_token_ids)
    assert '"high"' in prompt


def test_stop_keeps_what_came_and_again_adds_a_version(
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
    assert browser.run(f"{LAST}.querySelector('.text').textContent").strip() == "one two three"
    assert not service.running and len(service.aborted) == 1
    assert "2 of 2" in browser.run(f"{LAST}.querySelector('.meta').textContent")
    browser.run(f"{LAST}.querySelector('.meta button').click()")
    browser.until(f"{LAST}.querySelector('.meta').textContent.includes('1 of 2')")
    browser.run(
        f"[...{LAST}.querySelectorAll('.meta button')]"
        ".find((node) => node.textContent === 'Side by side').click()"
    )
    browser.until(f"{LAST}.querySelectorAll('.version').length === 2")


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
    browser.until("document.activeElement.parentElement.textContent === 'Result of f'")
    browser.type("21")
    browser.press(*ENTER)
    done(browser, 2)
    assert browser.run(f"{LAST}.querySelector('.text').textContent").strip() == "It is 21."
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


def test_a_reload_in_the_middle_of_an_answer_leaves_the_question(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    service.delay_s = 0.05
    say("one two three " * 40, EOS)
    ask(browser, "Count")
    browser.until(f"{LAST}?.textContent.includes('two')")
    browser.until("document.querySelectorAll('#conversations .open').length === 1")
    service.delay_s = 0.0
    browser.send("Page.reload")
    browser.until("document.querySelector('article.user .text')?.textContent === 'Count'")


def test_going_to_another_conversation_keeps_what_had_come(
    browser: Browser, say: Say, service: ScriptedService
) -> None:
    service.delay_s = 0.02
    say("one two three " * 60, EOS)
    ask(browser, "Count")
    browser.until(f"{LAST}?.textContent.includes('two')")
    browser.run("document.getElementById('new').click()")
    browser.until("document.getElementById('log').childElementCount === 0")
    browser.until("document.getElementById('stop').hidden")
    open_first = "document.querySelector('#conversations .open')?.click()"
    browser.until(f"({open_first}, document.querySelectorAll('article').length === 2)")
    assert browser.run(f"{LAST}.querySelector('.text').textContent").startswith("one two")
    # One that was deleted in the middle of its answer stays deleted.
    browser.run("document.getElementById('new').click()")
    ask(browser, "Once more")
    browser.until(f"{LAST}?.textContent.includes('two')")
    remove = "document.querySelector('#conversations [aria-current] ~ [title^=Delete]').click()"
    browser.until("document.querySelectorAll('#conversations .open').length === 2")
    browser.run(remove)
    browser.run(remove)
    browser.until("document.querySelectorAll('#conversations .open').length === 1")
    browser.until("document.getElementById('stop').hidden")
    browser.run("document.getElementById('list-toggle').click()")
    assert browser.run("document.querySelectorAll('#conversations .open').length") == 1


def test_the_last_conversation_gone_to_is_the_one_shown(browser: Browser, say: Say) -> None:
    say("one", EOS)
    ask(browser, "Count")
    done(browser, 1)
    # One opens while its turns are still read from the browser's store; the new one comes later.
    browser.until("document.querySelector('#conversations .open') !== null")
    open_first = "document.querySelector('#conversations .open').click()"
    browser.run(f"{open_first}; document.getElementById('new').click()")
    browser.until("document.querySelectorAll('#conversations .open').length === 1")
    time.sleep(0.3)
    assert browser.run("document.querySelectorAll('article').length") == 0
    ask(browser, "Once more")
    browser.until("document.querySelectorAll('#conversations .open').length === 2")


def test_an_image_is_pasted_and_one_is_added_by_keyboard(
    browser: Browser, say: Say, service: ScriptedService, tmp_path: Path
) -> None:
    say("Two squares.", EOS)
    browser.run(
        """(async () => {
          const canvas = new OffscreenCanvas(60, 40);
          canvas.getContext("2d").fillRect(0, 0, 60, 40);
          const blob = await canvas.convertToBlob({ type: "image/png" });
          const data = new DataTransfer();
          data.items.add(new File([blob], "a.png", { type: "image/png" }));
          const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
          document.getElementById("input").dispatchEvent(paste);
        })()"""
    )
    browser.until("document.querySelectorAll('#images img').length === 1")
    picture = tmp_path / "b.png"
    Image.new("RGB", (28, 28)).save(picture)
    browser.send("DOM.enable")
    browser.send("Page.setInterceptFileChooserDialog", enabled=True)
    browser.run("document.getElementById('attach').focus()")
    browser.press(*ENTER)
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.send("DOM.setFileInputFiles", files=[str(picture)], nodeId=node)
    browser.until("document.querySelectorAll('#images img').length === 2")
    browser.send("Page.setInterceptFileChooserDialog", enabled=False)
    browser.run("document.querySelector('#images button').focus()")
    browser.press(*ENTER)
    browser.until("document.querySelectorAll('#images img').length === 1")
    ask(browser, "What?")
    done(browser, 1)
    assert [image.pixels.shape for image in service.requests[-1].images] == [(3, 28, 28)]


def test_a_key_and_one_of_several_names_are_sent(
    browser: Browser, service: ScriptedService
) -> None:
    config = ServerConfig(("tiny", "other"), 4096, 800, api_keys=("secret",))
    with opened(browser, service, config) as say:
        say("x", EOS)
        assert browser.run("[...document.getElementById('model').options].map((o) => o.text)") == [
            "tiny", "other",
        ]  # fmt: skip
        ask(browser, "Hi")
        browser.until("document.querySelector('article.assistant .error') !== null")
        assert "key" in browser.run("document.querySelector('.error').textContent")
        assert all("401" in error for error in browser.errors), browser.errors
        browser.errors.clear()
        browser.run("document.getElementById('settings-toggle').click()")
        browser.run("document.getElementById('key').focus()")
        browser.type("secret")
        choose = "document.getElementById('model').value = 'other'"
        browser.run(choose)
        browser.run("document.getElementById('input').focus()")
        browser.press(*ENTER)
        done(browser, 1)
        assert len(service.requests) == 1


def test_thoughts_are_drawn_and_right_to_left_text_is_set_so(browser: Browser, say: Say) -> None:
    say(THINK, "It is **so**:\n\n- one", END_THINK, "שלום **עולם**.", EOS)
    browser.run("document.getElementById('effort').value = 'high'")
    ask(browser, "مرحبا")
    done(browser, 1)
    browser.until(f"{LAST}.querySelector('details.thought li') !== null")
    assert browser.run(f"{LAST}.querySelector('details.thought strong').textContent") == "so"
    browser.until(f"{LAST}.querySelector('.text strong') !== null")
    for block in (f"{LAST}.querySelector('.text p')", "document.querySelector('.user .text')"):
        assert browser.run(f"getComputedStyle({block}).direction") == "rtl"


# What is done to the page before it is looked at; each leaves it as it was for the next.
STATES = {
    "settings": "document.getElementById('settings-toggle').click()",
    "list": "document.getElementById('list-toggle').click()",
    "rename": "document.querySelector('#conversations [title^=Rename]').click()",
    "edit": "document.querySelector('article.user .meta button').click()",
    "thought": "document.querySelector('details.thought').open = true",
    "beside": "[...document.querySelectorAll('.meta button')]"
    ".find((one) => one.textContent === 'Side by side').click()",
}


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_state_of_the_page_has_a_serious_fault(
    browser: Browser, say: Say, width: int, height: int, theme: str
) -> None:
    browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=width < 600,
    )

    def look(state: str) -> None:
        problems = serious_faults(browser)
        assert not problems, (state, problems)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), state
        if width < 600:
            small = browser.run("""[...document.querySelectorAll(
                "button, select, summary, textarea, input:not([type=checkbox])")]
              .filter((node) => node.offsetParent && node.getBoundingClientRect().height < 43.5)
              .map((node) => node.outerHTML.slice(0, 80))""")
            assert small == [], state
        shot = browser.send("Page.captureScreenshot", format="png")["data"]
        folder = Path("build/screenshots")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{state}-{width}-{theme}.png").write_bytes(base64.b64decode(shot))

    try:
        browser.run(f"document.documentElement.dataset.theme = '{theme}'")
        look("empty")
        browser.run("document.getElementById('effort').value = 'high'")
        say(THINK, "Perhaps.", END_THINK, MARKDOWN.replace("\\\\", "\\"), EOS)
        ask(browser, "Show everything")
        done(browser, 1)
        browser.run("document.querySelector('.again').click()")
        browser.until(f"{LAST}.querySelector('.meta').textContent.includes('2 of 2')")
        for state, script in STATES.items():
            browser.run(script)
            look(state)
        tools = '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'
        browser.run(f"document.getElementById('tools').value = `{tools}`")
        browser.run("document.getElementById('settings-toggle').click()")
        browser.run("document.getElementById('list-toggle').click()")
        say(CALLS, "f", ARGS, '{"a": 1}', EOS)
        ask(browser, "Call")
        browser.until("document.querySelector('form.call') !== null")
        look("call")
        browser.run("document.getElementById('temperature').value = '9'")
        ask(browser, "Hot")
        browser.until("document.querySelector('article.assistant .error') !== null")
        look("error")
        # Where the eye is: whole within the log, not below its edge.
        assert browser.run("""(() => {
          const said = document.querySelector('[role=alert]').getBoundingClientRect();
          const log = document.getElementById('log').getBoundingClientRect();
          return said.height > 0 && said.top >= log.top - 1 && said.bottom <= log.bottom + 1;
        })()""")
        browser.errors.clear()
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")
