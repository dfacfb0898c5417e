"""The chat page in a headless Chromium, against a server that answers what a test tells it to."""

import json
import re
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from page_server import FILES, HOLD, Server
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

pytestmark = pytest.mark.slow

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM.exists(), f"{CHROMIUM} is missing: the page is tested in it. Install Debian's package `chromium`."
    expect.set_options(timeout=20_000)
    with chromium() as browser:
        yield browser


@contextmanager
def chromium():
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-smooth-scrolling"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=arguments) as browser:
            yield browser


@pytest.fixture(scope="module")
def running_server():
    with Server() as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    return running_server


@pytest.fixture
def context(browser: Browser, server: Server):
    """A browser without history. The page may say nothing on the console, open no dialog and call no other server."""
    with browser.new_context(viewport={"width": 1100, "height": 750}) as context:
        context.set_default_timeout(20_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
        seen = []
        context.on("console", lambda message: seen.append(message.text))
        context.on("weberror", lambda error: seen.append(str(error.error)))
        context.on("dialog", lambda dialog: seen.append(dialog.message) or dialog.dismiss())
        context.on("request", lambda request: seen.append(request.url) if not ours(request.url, server) else None)
        yield context
    # Chromium itself writes one line for each answer that is an error.
    assert not [line for line in seen if not line.startswith("Failed to load resource: the server responded")]


def ours(url: str, server: Server) -> bool:
    return url.startswith(("data:,", "blob:" + server.url)) or urlsplit(url).path in (
        "/",
        *(f"/page/{path.name}" for path in FILES.iterdir()),
        "/v1/models",
        "/v1/chat/completions",
    )


@pytest.fixture
def page(context: BrowserContext, server: Server):
    page = context.new_page()
    page.goto(server.url)
    return page


def ask(page: Page, text: str):
    box(page).fill(text)
    box(page).press("Enter")


def box(page: Page):
    return page.get_by_label("Message", exact=True)


def replies(page: Page):
    return page.get_by_role("article", name="Reply")


def questions(page: Page):
    return page.get_by_role("article", name="You")


def test_a_reply_streams(page, server):
    answer = server.say("The Andes ", HOLD, "are **high**.", usage={"prompt_tokens": 12, "completion_tokens": 5})
    ask(page, "Tell me about the Andes")
    expect(replies(page).locator(".body")).to_have_text("The Andes ")
    expect(replies(page)).to_have_attribute("aria-busy", "true")
    answer.gate.release()
    expect(replies(page).locator(".body")).to_have_text("The Andes are high.")
    expect(replies(page).locator("strong")).to_have_text("high")
    expect(replies(page).locator(".note")).to_have_text(
        re.compile(r"^5 tokens · [\d.]+ tokens/s · first token after [\d.]+ s · prompt of 12 tokens$")
    )
    assert server.requests[0] == {
        "model": "llama-3.2-1b",
        "messages": [{"role": "user", "content": "Tell me about the Andes"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_events_may_be_cut_anywhere(page, server):
    first, second = (
        json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False) for text in ("A", "ñu")
    )
    raw = f": a comment\r\n\r\ndata: {first}\r\n\r\ndata:{second}\r\n\r\n".encode()
    cuts = [0, raw.index("ñ".encode()) + 1, len(raw) - 3, len(raw)]  # in the letter, in the last line ends
    one, two, three = (raw[start:end] for start, end in pairwise(cuts))
    answer = server.say(one, HOLD, two, HOLD, three, "!")
    ask(page, "Hello")
    expect(replies(page).locator(".body")).to_have_text("A")
    answer.gate.release()
    expect(replies(page).locator(".body")).to_have_text("A")
    answer.gate.release()
    expect(replies(page).locator(".body")).to_have_text("Añu!")


def test_stop_ends_the_request(page, server):
    answer = server.say("One, two, ", HOLD, "three")
    ask(page, "Count")
    expect(replies(page).locator(".body")).to_have_text("One, two, ")
    page.get_by_role("button", name="Stop").click()
    assert answer.disconnected.wait(10)
    expect(replies(page).locator(".body")).to_have_text("One, two, ")
    expect(replies(page).locator(".note")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_regenerate_replaces_the_reply_and_a_failure_keeps_it(page, server):
    for text in ("First", "Second"):
        server.say(text)
    ask(page, "Say something")
    expect(replies(page).locator(".body")).to_have_text("First")
    page.get_by_role("button", name="Regenerate").click()
    expect(replies(page).locator(".body")).to_have_text("Second")
    assert server.requests[0] == server.requests[1]
    server.say(status=503, message="The server is stopping.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("alert")).to_have_text("The server is stopping.")
    expect(replies(page).locator(".body")).to_have_text("Second")


def test_edit_drops_what_follows(page, server):
    for text in ("A1", "A2", "B1"):
        server.say(text)
    ask(page, "first")
    expect(replies(page).last.locator(".body")).to_have_text("A1")
    ask(page, "second")
    expect(replies(page).last.locator(".body")).to_have_text("A2")
    questions(page).first.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Your message")
    expect(field).to_be_focused()
    field.fill("first, again")
    page.reload()  # what was typed is there
    expect(page.get_by_label("Your message")).to_have_value("first, again")
    page.get_by_label("Your message").press("Enter")
    expect(replies(page).locator(".body")).to_have_text(["B1"])
    expect(questions(page).locator(".body")).to_have_text(["first, again"])
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "first, again"}]
    assert len(server.requests[1]["messages"]) == 3


INJECTIONS = """<img src=x onerror=alert(1)> <script>alert(2)</script> **<img src=y onerror=alert(3)>**

[a](javascript:alert(4)) [b](data:text/html,<script>alert(5)</script>) [c](JaVaScRiPt:alert(6)) [d](//other.example/)

![e](https://other.example/e.png) [good](https://example.org/x?a=1&b=2)

# <svg onload=alert(7)>

- <iframe src=javascript:alert(8)></iframe>
- `<b>code</b>`

```html"onload=alert(9)
<script>alert(10)</script>
```"""


def test_a_reply_cannot_inject(page, server):
    server.say(*[INJECTIONS[i : i + 5] for i in range(0, len(INJECTIONS), 5)])
    ask(page, "<img src=z onerror=alert(0)>")
    expect(replies(page).locator(".note")).to_contain_text("tokens")
    assert page.locator("#messages :is(img, script, iframe, object, embed, style, form, link, b)").count() == 0
    assert page.locator("#messages svg[onload]").count() == 0
    hrefs = page.locator("#messages a").evaluate_all("all => all.map(a => [a.getAttribute('href'), a.rel])")
    assert hrefs == [
        ["https://other.example/e.png", "noopener noreferrer"],
        ["https://example.org/x?a=1&b=2", "noopener noreferrer"],
    ]
    shown = replies(page).locator(".body").inner_text()
    for text in (
        "<img src=x onerror=alert(1)>",
        "<script>alert(2)</script>",
        "[a](javascript:alert(4))",
        "<svg onload",
    ):
        assert text in shown
    expect(questions(page).locator(".body")).to_have_text("<img src=z onerror=alert(0)>")
    page.reload()  # the kept history is shown by the same code
    expect(replies(page).locator(".body")).to_contain_text("[c](JaVaScRiPt:alert(6))")
    assert page.locator("#messages :is(img, script, iframe)").count() == 0


def test_markdown(page, server):
    text = """# Plan
Some *light* and **bold *both*** text, `a * b`, 2 * 3 * 4, \\*no\\*, snake_case_name.
Second line

3. three
   - inner one
   - inner two

     ```
     x = 1
     ```
4. four
- another list

~~~python
a = "**not bold**"

# no heading
~~~
after"""
    server.say(text)
    ask(page, "A plan")
    body = replies(page).locator(".body")
    expect(body.locator("> *")).to_have_count(6)
    assert body.evaluate("e => [...e.children].map(c => c.tagName)") == ["H3", "P", "OL", "UL", "DIV", "P"]
    expect(body.locator("> p").first).to_have_text(
        "Some light and bold both text, a * b, 2 * 3 * 4, *no*, snake_case_name.\nSecond line"
    )
    expect(body.locator("> p").first.locator("em")).to_have_text(["light", "both"])
    expect(body.locator("> ol")).to_have_attribute("start", "3")
    expect(body.locator("> ol > li")).to_have_count(2)
    expect(body.locator("> ol > li > ul > li")).to_have_count(2)
    expect(body.locator("> ol pre")).to_have_text("x = 1")
    expect(body.locator("> .code pre")).to_have_text('a = "**not bold**"\n\n# no heading')
    body.locator("> .code").get_by_role("button", name="Copy").click()
    wait_for_clipboard(page, 'a = "**not bold**"\n\n# no heading')
    page.locator(".reply > .tools").get_by_role("button", name="Copy").click()
    wait_for_clipboard(page, text)


def wait_for_clipboard(page: Page, text: str):
    page.wait_for_function("text => navigator.clipboard.readText().then(found => found === text)", arg=text)


def test_text_made_to_be_slow_is_shown(page, server):
    """Marks that never close, and lists in lists in lists."""
    hard = [
        "*" * 4000,
        "**a " * 2000,
        "`" * 999 + "a" + "`" * 998,
        "[" * 5000,
        "- " * 3000,
        "**a *b " * 2000,
        "[a](" * 2000,
        "1. " * 2000,
    ]
    for text in hard:
        server.say(text)
        ask(page, "Go")
        expect(replies(page).last.locator(".note")).to_contain_text("tokens")
        assert replies(page).last.locator(".body").inner_text().strip()


def test_an_edit_ends_the_reply_that_it_replaces(page, server):
    first = server.say("Old ", HOLD, "reply")
    ask(page, "before")
    expect(replies(page).locator(".body")).to_have_text("Old ")
    second = server.say("New ", HOLD, "reply")
    questions(page).get_by_role("button", name="Edit").click()
    page.get_by_label("Your message").fill("after")
    page.get_by_role("button", name="Resend").click()
    assert first.disconnected.wait(10)
    expect(replies(page).locator(".body")).to_have_text(["New "])
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    second.gate.release()
    expect(replies(page).locator(".body")).to_have_text(["New reply"])
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "after"}]


def test_phone(browser, server):
    with browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True) as context:
        page = context.new_page()
        page.goto(server.url)
        server.say("A long word: " + "x" * 300 + "\n\n```\n" + "y = 1; " * 60 + "\n```\n\n" + "Line. " * 300)
        ask(page, "Write " + "w" * 200)
        expect(replies(page).locator(".note")).to_contain_text("tokens")
        no_sideways_scroll(page)
        expect(page.locator("#side")).to_be_hidden()
        page.get_by_role("button", name="List of conversations").click()
        expect(page.get_by_role("button", name="New conversation")).to_be_in_viewport(ratio=1)
        expect(page.get_by_role("button", name="New conversation")).to_be_focused()
        assert page.locator("#column").evaluate("e => e.inert")
        no_sideways_scroll(page)
        page.emulate_media(reduced_motion="reduce")
        assert page.locator("#side").evaluate("e => getComputedStyle(e).transitionProperty") == "none"
        page.keyboard.press("Escape")
        expect(page.locator("#side")).to_be_hidden()
        expect(page.get_by_role("button", name="List of conversations")).to_be_focused()
        page.get_by_role("button", name="List of conversations").click()
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("#side")).to_be_hidden()
        expect(page.get_by_text("What would you like to ask?")).to_be_visible()
        page.get_by_role("button", name="Settings", exact=True).click()
        expect(page.get_by_label("System prompt")).to_be_visible()
        no_sideways_scroll(page)
        assert page.locator("#settings").evaluate("e => e.scrollWidth <= e.clientWidth")


def no_sideways_scroll(page: Page):
    assert page.evaluate("""() => [document.documentElement, document.body, document.getElementById("scroll")].every(
        e => e.scrollWidth <= e.clientWidth)""")
    assert page.evaluate("document.documentElement.clientWidth") == 360


def test_keyboard_alone(page, server):
    keys = page.keyboard
    first = server.say("One ", HOLD, "two")
    expect(box(page)).to_be_focused()
    keys.type("Line one")
    keys.press("Shift+Enter")
    keys.type("line two")
    keys.press("Enter")
    expect(replies(page).locator(".body")).to_have_text("One ")
    keys.type("next")  # written while the reply is written; Enter does not send it
    keys.press("Enter")
    keys.press("Escape")
    assert first.disconnected.wait(10)
    expect(replies(page).locator(".note")).to_contain_text("stopped")
    expect(box(page)).to_have_value("next")
    assert server.requests[0]["messages"][0]["content"] == "Line one\nline two"

    server.say("Again")
    press_until_focused(page, "Shift+Tab", page.get_by_role("button", name="Regenerate"))
    keys.press("Enter")
    expect(replies(page).locator(".body")).to_have_text("Again")
    expect(box(page)).to_be_focused()

    server.say("Third")
    keys.press("Enter")
    expect(replies(page).locator(".body")).to_have_text(["Again", "Third"])
    expect(box(page)).to_have_value("")
    expect(page.locator("#spoken")).to_have_text("ThirdReply complete.")
    press_until_focused(page, "Shift+Tab", page.get_by_role("link", name="Skip to the message field"))
    expect(page.get_by_role("link", name="Skip to the message field")).to_be_in_viewport(ratio=1)
    keys.press("Enter")
    expect(box(page)).to_be_focused()


def press_until_focused(page: Page, key: str, wanted):
    """Each element on the way shows that it has the focus."""
    for _ in range(40):
        page.keyboard.press(key)
        assert page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            return e === document.body || e.id === "box" || s.outlineStyle === "solid" }""")
        if wanted.evaluate("e => e === document.activeElement"):
            return
    raise AssertionError(f"{key} never reaches {wanted}")


def test_reload_keeps_history_and_typed_text(page, server):
    server.say("Kept ", HOLD, "lost")
    ask(page, "Question")
    expect(replies(page).locator(".body")).to_have_text("Kept ")
    box(page).fill("half a sent")
    page.reload()
    expect(questions(page).locator(".body")).to_have_text("Question")
    expect(replies(page).locator(".body")).to_have_text("Kept ")
    expect(box(page)).to_have_value("half a sent")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    expect(page.locator("#spoken")).to_be_empty()  # old replies are not read out


def test_a_key_is_asked_for(page, server):
    server.key = "secret"
    page.reload()
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server did not accept this key.")).to_be_visible()
    page.get_by_label("Key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Model")).to_have_value("llama-3.2-1b")
    server.say("Welcome")
    ask(page, "Hello")
    expect(replies(page).locator(".body")).to_have_text("Welcome")
    assert server.keys[-1] == "Bearer secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")

    server.key = "new"
    ask(page, "Still there?")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_have_text("The server asks for an API key.")
    server.key = "secret"
    server.say("Yes")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page).last.locator(".body")).to_have_text("Yes")


def test_a_failure_can_be_retried(page, server):
    server.say(status=429, message="All places are taken.")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_have_text("All places are taken. Try again in 3 s.")
    expect(questions(page).locator(".body")).to_have_text("Hello")
    server.say("Hi", error="The device was lost.")
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_have_text("The device was lost.")
    expect(replies(page).locator(".body")).to_have_text("Hi")
    server.say("Half", finish=None)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_have_text("The connection closed before the reply was complete.")
    server.say("Hi there", finish="length")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page).locator(".body")).to_have_text("Hi there")
    expect(replies(page).locator(".note")).to_contain_text("ended at the token limit")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert all(request == server.requests[0] for request in server.requests)


def test_an_empty_failed_reply_is_not_sent(page, server):
    server.say(status=503, message="Not now.")
    ask(page, "one")
    expect(page.get_by_role("alert")).to_have_text("Not now.")
    server.say("Both")
    ask(page, "two")
    expect(replies(page).last.locator(".body")).to_have_text("Both")
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]


def test_settings_are_sent_and_reset(page, server):
    expect(page.get_by_label("Model")).to_have_value("llama-3.2-1b")
    page.get_by_label("Model").select_option("poems")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    values = {"Temperature": 0.7, "Top p": 0.9, "Top k": 40, "Min p": 0.05, "Repetition penalty": 1.1}
    values |= {"Presence penalty": -1, "Frequency penalty": 0.5, "Most tokens in a reply": 64, "Seed": 3}
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_label("Seed", exact=True).press("Enter")
    server.say("Ok")
    ask(page, "Hello")
    expect(replies(page).locator(".body")).to_have_text("Ok")
    sent = server.requests[0]
    assert sent["model"] == "poems"
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    names += ("presence_penalty", "frequency_penalty", "max_tokens", "seed")
    assert {name: sent[name] for name in names} == dict(zip(names, values.values(), strict=True))

    page.reload()
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.7")
    page.get_by_label("Temperature", exact=True).fill("-1")  # invalid: shown as such, and not sent
    page.get_by_label("Temperature", exact=True).blur()
    assert page.locator("#temperature:invalid").count() == 1
    page.keyboard.press("Escape")
    server.say("Ok")
    ask(page, "Hello")
    expect(replies(page).locator(".body")).to_have_text(["Ok", "Ok"])
    assert "temperature" not in server.requests[1] and server.requests[1]["seed"] == 3
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("button", name="Reset sampling").click()
    page.get_by_role("button", name="Done").click()
    server.say("Ok")
    ask(page, "Hello")
    expect(replies(page).locator(".body")).to_have_text(["Ok", "Ok", "Ok"])
    assert not server.requests[2].keys() & names and server.requests[2]["model"] == "poems"


def test_conversations_rename_delete_export_import(page, server, tmp_path):
    first, second = server.say("Slow ", HOLD, "reply"), server.say("Quick")
    ask(page, "First question")
    expect(replies(page).locator(".body")).to_have_text("Slow ")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Second question")
    expect(replies(page).locator(".body")).to_have_text("Quick")
    first.gate.release()  # written while another conversation is shown
    page.get_by_role("button", name="First question").click()
    expect(replies(page).locator(".body")).to_have_text("Slow reply")
    assert not second.disconnected.is_set()

    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name of the conversation").fill("Renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    path = tmp_path / "one.json"
    download.value.save_as(path)
    (exported,) = json.loads(path.read_text())["conversations"]
    assert exported["title"] == "Renamed"
    assert [(m["role"], m["content"]) for m in exported["messages"]] == [
        ("user", "First question"),
        ("assistant", "Slow reply"),
    ]

    titles = page.locator("#list .pick")
    page.get_by_role("button", name="Delete").click()
    expect(titles).to_have_text(["Second question"])
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_count(2)
    page.get_by_role("button", name="Delete").click()
    page.reload()
    expect(titles).to_have_text(["Second question"])
    page.get_by_label("A file of conversations").set_input_files(path)
    expect(titles).to_have_count(2)
    expect(replies(page).locator(".body")).to_have_text("Slow reply")
    path.write_text("[]")
    page.get_by_label("A file of conversations").set_input_files(path)
    expect(page.get_by_role("status")).to_contain_text("one.json is not a file of conversations")
    path.write_text(json.dumps({"conversations": [{"system": "x" * 11_000_000}]}))
    page.get_by_label("A file of conversations").set_input_files(path)
    expect(page.get_by_role("status")).to_contain_text("its storage is full")


def test_scrolling_follows_only_a_reader_at_the_end(page, server):
    answer = server.say("Line.\n\n" * 100, HOLD, "Line.\n\n" * 100, HOLD, "The end.")
    ask(page, "Long")
    expect(replies(page).locator(".body > p")).to_have_count(100)
    from_end = (
        "() => { const e = document.getElementById('scroll'); return e.scrollHeight - e.scrollTop - e.clientHeight }"
    )
    page.wait_for_function(from_end.replace("return ", "return 2 > "))
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -600)
    expect(page.get_by_role("button", name="Go to the end")).to_be_visible()
    top = page.locator("#scroll").evaluate("e => e.scrollTop")
    answer.gate.release()
    expect(replies(page).locator(".body > p")).to_have_count(200)
    assert page.locator("#scroll").evaluate("e => e.scrollTop") == top
    page.get_by_role("button", name="Go to the end").click()
    answer.gate.release()
    expect(replies(page).get_by_text("The end.")).to_be_in_viewport()
    assert page.evaluate(from_end) < 2


def test_two_tabs_share_their_history(page, context, server):
    other = context.new_page()
    other.goto(server.url)
    server.say("Shared")
    ask(page, "Here")
    expect(replies(page).locator(".body")).to_have_text("Shared")
    expect(replies(other).locator(".body")).to_have_text("Shared")


@pytest.mark.parametrize("scheme, other", [("light", "dark"), ("dark", "light")])
def test_light_and_dark(page, server, scheme, other):
    page.emulate_media(color_scheme=scheme)
    server.say("Text with `code` and [a link](https://example.org).\n\n```py\nx\n```")
    ask(page, "Hello")
    expect(replies(page).locator(".note")).to_contain_text("tokens")
    assert brightness(page) == scheme
    assert_readable(page)
    for _ in range(["light", "dark"].index(other) + 1):
        page.get_by_role("button", name="Theme").click()
    expect(page.get_by_role("button", name="Theme")).to_have_accessible_name(f"Theme: {other}")
    assert brightness(page) == other
    assert_readable(page)
    page.reload()
    assert brightness(page) == other


def brightness(page: Page) -> str:
    return "light" if sum(numbers(page.evaluate("getComputedStyle(document.body).backgroundColor"))) > 384 else "dark"


def numbers(colour: str) -> list[float]:
    return [float(n) for n in re.findall(r"[\d.]+", colour)][:3]


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    channels = [c / 255 for c in numbers(colour)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def assert_readable(page: Page):
    """Every visible text has a contrast of 4.5 with what is behind it (WCAG AA)."""
    found = page.evaluate("""() => [...document.body.querySelectorAll("*")].filter(
        e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
            let behind = e;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [e.textContent, getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
        })""")
    assert len(found) > 8
    for text, colour, behind in found:
        dark, light = sorted((luminance(colour), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text}: {colour} on {behind}"


DEMO = (
    (
        "Which animals of the puna are related to camels?",
        "The **llama**, the **alpaca**, the *guanaco* and the *vicuña*. People keep the first two.",
    ),
    (
        "Write a function that sorts them by weight.",
        "Weights are those of an adult, in kilograms:\n\n```python\n"
        'WEIGHTS = {"llama": 150, "guanaco": 115, "alpaca": 65, "vicuña": 45}\n'
        "def by_weight(names: list[str]) -> list[str]:\n"
        "    return sorted(names, key=WEIGHTS.get, reverse=True)\n```\n\n"
        '`by_weight(["vicuña", "llama"])` gives `["llama", "vicuña"]`.',
    ),
)


def converse(page: Page, server: Server):
    """Conversations to look at, at the pace of a small model."""
    for other in ("A poem about the altiplano", "Explain rotary embeddings"):
        server.say("Yes.")
        ask(page, other)
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        page.locator("#new").click()
    prompt = 0
    for question, reply in DEMO:
        pieces = re.findall(r"\s*\S+\s*", reply)
        usage = {"prompt_tokens": prompt + len(question.split()) + 9, "completion_tokens": len(pieces)}
        prompt = sum(usage.values())
        server.say(*pieces, pace=0.01, usage=usage)
        ask(page, question)
        expect(replies(page).last.get_by_role("button", name="Regenerate")).to_be_visible()


def save_picture():
    with Server() as server, chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 750}, color_scheme="light")
        page.goto(server.url)
        converse(page, server)
        page.screenshot(path=FILES.parent.parent / "docs/chat.png")


if __name__ == "__main__":  # docs/chat.png anew
    save_picture()
