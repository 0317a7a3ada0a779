"""The page at /: its files over HTTP, and its use in headless Chromium where that is installed.

The browser needs Debian's `chromium` and `pip install playwright` (without its own browsers); CI has neither and
skips those tests.
"""

import json
import re
import shutil

import httpx
import pytest
from live import live_server

FILES = re.compile(r'(?:src|href)="([^"]+)"')
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LONG = 30_000  # ms; more than any answer takes


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url) as client:
        yield client


# -- files --


def test_page_loads_only_what_the_server_has(http):
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    pending, seen = set(FILES.findall(page.text)), set()
    assert {"ui/app.js", "ui/style.css", "ui/icon.svg"} <= pending
    while pending:
        path = pending.pop()
        seen.add(path)
        answer = http.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "url(" not in answer.text
        if path.endswith(".js"):
            assert answer.headers["content-type"].startswith("text/javascript")
            assert "innerHTML" not in answer.text
            pending |= {f"ui/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)} - seen
    assert {"ui/api.js", "ui/chat.js", "ui/engine.js", "ui/text.js"} <= seen
    assert "<script>" not in page.text
    assert " style=" not in page.text
    assert not re.search(r"\son\w+=", page.text)


def test_page_forbids_everything_from_elsewhere(http):
    policy = http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_page_is_sent_once(http):
    first = http.get("/ui/app.js")
    again = http.get("/ui/app.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert http.get("/ui/app.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert http.head("/").status_code == 200


@pytest.mark.parametrize("path", ["/ui/none.js", "/ui/..%2fui.py", "/ui/%2e%2e/ui.py", "/ui/", "/ui/__init__.py"])
def test_page_has_no_other_files(http, path):
    answer = http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


# -- browser --


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need `pip install playwright`")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the browser tests need Debian's package chromium")
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=chromium, headless=True, args=FLAGS
        )
        context.set_default_timeout(LONG)
        yield context
        context.close()


@pytest.fixture
def expect(browser):
    from playwright.sync_api import expect

    expect.set_options(timeout=LONG)
    return expect


@pytest.fixture
def open_page(browser):
    """A function of a server: the page in a new tab, which may log no error but those of failed requests."""
    pages, complaints = [], []

    def open_page(server):
        page = browser.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if is_error(message) else None)
        page.goto(server.url)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def is_error(message) -> bool:
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


@pytest.fixture
def page(open_page, server):
    return open_page(server)


def ask(page, question, **settings):
    for name, value in settings.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.fill("#question", question)
    page.press("#question", "Enter")


def force_answer(page, text):
    """Let the model's answers be `text`, by a field of the request that the page doesn't set."""

    def force(route):
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "guided_choice": [text]}))

    page.route("**/v1/chat/completions", force)


def answer_of(page):
    return page.locator(".answer").last


def whole(expect, page):
    answer = answer_of(page)
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer


def test_answer_with_its_figures(page, expect):
    expect(page.locator("#model")).to_have_value("smollm2")
    ask(page, "What is the capital of France?", temperature=0, max_tokens=40)
    answer = whole(expect, page)
    expect(answer.locator("> .text")).to_contain_text("Paris")
    expect(answer.locator(".figures")).to_have_text(re.compile(r"^TTFT [\d.]+ m?s · [\d.]+ tok/s · \d+ tokens$"))
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator("#status")).to_have_text(re.compile(r"Answer complete, \d+ tokens"))


def test_request_carries_settings_and_conversation(page, expect):
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    ask(page, "Hi", system="Be brief.", temperature=0.5, top_p=0.9, top_k=20, max_tokens=4, seed=7, stop="a b\n\\n\\n")
    first = whole(expect, page).locator("> .text").inner_text()
    page.fill("#question", "And")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("now?")
    page.click("#send")
    expect(page.locator(".exchange")).to_have_count(2)
    whole(expect, page)
    expected = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "max_tokens": 4, "seed": 7, "stop": ["a b", "\n\n"]}
    assert {name: bodies[0][name] for name in expected} == expected
    assert bodies[0]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert [m["role"] for m in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][2]["content"].strip() == first.strip()
    assert bodies[1]["messages"][3]["content"] == "And\nnow?"
    page.locator(".again").last.click()  # the same question, not one more
    expect(page.locator("#stop")).to_be_hidden()
    assert bodies[2]["messages"] == bodies[1]["messages"]
    page.click("#clear")
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_stop_ends_the_request_in_the_engine(page, expect, http):
    ask(page, "Tell me a very long story.", temperature=0, max_tokens=900)
    expect(answer_of(page).locator("> .text")).not_to_be_empty()
    expect(page.locator("[data-meter=running] dd")).to_have_text("1")
    expect(page.locator("#send")).to_be_hidden()
    page.click("#stop")
    answer = whole(expect, page)
    expect(answer.locator(".figures")).to_have_text(re.compile(r"^TTFT .* tok/s · \d+ tokens? · stopped$"))
    expect(answer.locator(".again")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("[data-meter=running] dd")).to_have_text("0")
    assert re.search(r'request_success_total\{finished_reason="abort",[^}]*\} [1-9]', http.get("/metrics").text)


def test_engine_panel_lives(page, expect):
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("[data-meter=waiting] dd")).to_have_text("0")
    ask(page, "Tell me a long story.", temperature=0, max_tokens=200)
    expect(page.locator("[data-meter=generation] dd")).to_have_text(re.compile(r"^[1-9][\d.]* tok/s$"))
    expect(page.locator("[data-meter=cache] dd")).to_have_text(re.compile(r"^\d*[.1-9]\d*%$"))
    page.keyboard.press("Escape")
    whole(expect, page)
    points = page.locator("[data-meter=generation] polyline").get_attribute("points").split()
    heights = {float(point.split(",")[1]) for point in points}
    assert len(points) >= 2
    assert 1.0 in heights  # the highest of the last minute fills the graph


def test_error_is_one_line_and_can_be_tried_again(page, expect):
    ask(page, "Hello", temperature=-1, max_tokens=4)
    error = whole(expect, page).locator(".error")
    expect(error).to_have_text("400: temperature=-1.0 must be between 0 and 100")
    page.fill("#settings [name=temperature]", "0")
    page.get_by_role("button", name="Try again").click()
    expect(error).to_be_hidden()
    expect(whole(expect, page).locator("> .text")).not_to_be_empty()


def test_hostile_answers_stay_text(page, expect):
    hostile = (
        '<img src=x onerror="document.title=1"><script>document.title=2</script> `<b>`\n\n```html\n<i>code</i>\n```'
    )
    force_answer(page, hostile)
    ask(page, "Attack")
    text = whole(expect, page).locator("> .text")
    expect(text.locator("p")).to_have_text(
        '<img src=x onerror="document.title=1"><script>document.title=2</script> <b>'
    )
    expect(text.locator("pre code")).to_have_text("<i>code</i>")
    expect(text.locator("figcaption")).to_contain_text("html")
    assert text.locator("img, script, b, i").count() == 0
    assert page.title() == "ATOM playground"


def test_page_follows_a_server_that_returns_with_another_model(page, expect):
    expect(page.locator("#state")).to_have_text("ready")
    page.route("**/metrics", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("unreachable")
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "other"}]}))
    page.unroute("**/metrics")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#model")).to_have_value("other")
    ask(page, "Hello")
    error = whole(expect, page).locator(".error")
    expect(error).to_have_text("404: the model 'other' does not exist; served: smollm2")


def test_narrow_page_has_no_sideways_scrolling(page, expect):
    page.set_viewport_size({"width": 380, "height": 700})
    expect(page.locator("#panel")).to_be_hidden()
    page.click("#toggle")
    expect(page.locator("#settings [name=seed]")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    page.fill("#question", "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


@pytest.fixture(scope="module")
def guarded(browser, tmp_path_factory):  # no server where there is no browser to use it
    """A server with a key and a parser of reasoning."""
    flags = ["--api-key", "secret", "--reasoning-parser", "qwen3", "--max-num-seqs", "2"]
    with live_server(tmp_path_factory.mktemp("guarded"), *flags) as server:
        yield server


def test_key_is_asked_for_and_kept_for_the_tab(open_page, expect, guarded):
    page = open_page(guarded)
    expect(page.locator("#notice")).to_have_text("This server needs an API key: enter it in the settings.")
    expect(page.locator("[name=key]")).to_be_focused()
    expect(page.locator("#state")).to_have_text("ready")
    ask(page, "Hello", key="wrong", max_tokens=4)
    expect(whole(expect, page).locator(".error")).to_contain_text("401: a valid API key is needed")
    page.fill("[name=key]", "secret")
    page.press("[name=key]", "Tab")
    expect(page.locator("#model")).to_have_value("smollm2")
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#status")).to_have_text(re.compile("complete"))
    expect(page.locator("#stop")).to_be_hidden()
    expect(answer_of(page).locator(".error")).to_be_hidden()
    page.reload()
    expect(page.locator("[name=key]")).to_have_value("secret")
    expect(page.locator("#model")).to_have_value("smollm2")
    assert page.evaluate("localStorage.length") == 0


def test_reasoning_folds(open_page, expect, guarded):
    page = open_page(guarded)
    force_answer(page, "<think>One and one.</think>Two")
    ask(page, "1+1?", key="secret")
    answer = whole(expect, page)
    expect(answer.locator("> .text")).to_have_text("Two")
    expect(answer.locator(".reasoning .text")).to_be_hidden()
    answer.locator("summary").click()
    expect(answer.locator(".reasoning .text")).to_have_text("One and one.")
    page.unroute_all()
    ask(page, "2+2?", max_tokens=4)
    expect(page.locator(".exchange")).to_have_count(2)
    whole(expect, page)


def test_server_that_is_gone(open_page, expect, guarded):
    page = open_page(guarded)
    expect(page.locator("#state")).to_have_text("ready")
    guarded.process.terminate()
    guarded.process.wait(60)
    expect(page.locator("#state")).to_have_text("unreachable")
    ask(page, "Hello?", key="secret")
    expect(whole(expect, page).locator(".error")).to_have_text("The server can't be reached.")
