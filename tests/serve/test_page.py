"""The page to chat with: what it may do, and in a browser where one is found."""

import re
import shutil
import time

import pytest


def test_files_and_what_they_may_do(serve):
    client = serve()
    for path, kind in (("/", "html"), ("/chat.js", "javascript"), ("/style.css", "css")):
        status, headers, data = client.request("GET", path)
        assert status == 200 and headers["Content-Type"] == f"text/{kind}; charset=utf-8"
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        text = data.decode()
        assert not re.search(r"https?://|innerHTML|insertAdjacent|document\.write|\beval\b", text)
        assert not re.search(r"<script>|\son\w+=|style=", text)


@pytest.fixture
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="drives a browser")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_talk_in_a_browser(serve, browser):
    """Text of people and models is text; an answer can be stopped; a key is asked for."""
    seen = []

    def say(s):
        seen.append(client.server.language.detokenize(s.prompt))
        return "<b>fine</b> & <img src=x onerror=alert(1)>" if len(seen) == 1 else "x" * 900

    client = serve(say, seconds=0.01, api_key="sesame")
    page, complaints = browser.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(client.url)
    until(lambda: "API key" in page.inner_text("#model"))
    page.click("summary")
    page.fill("#key", "sesame")
    page.fill("#system", "Be kind.")
    page.fill("#tokens", "400")
    until(lambda: page.inner_text("#model") == "tiny")
    page.fill("#text", "<i>Hi</i>")
    page.press("#text", "Enter")
    until(lambda: page.locator(".facts").count() == 1)
    assert page.inner_text(".user") == "<i>Hi</i>"
    assert page.inner_text(".assistant") == "<b>fine</b> & <img src=x onerror=alert(1)>"
    assert page.locator("#talk b, #talk i, #talk img").count() == 0
    assert seen[0] == "[system:Be kind.][user:<i>Hi</i>][assistant:"

    page.fill("#text", "More")
    page.click("#send")
    until(lambda: len(page.locator(".assistant").nth(1).inner_text()) > 20)
    assert page.inner_text("#send") == "Stop"
    page.click("#send")
    until(lambda: page.inner_text("#send") == "Send" and client.scheduler.is_idle)
    assert len(page.locator(".assistant").nth(1).inner_text()) < 300
    assert seen[1].endswith(
        "[assistant:<b>fine</b> & <img src=x onerror=alert(1)>][user:More][assistant:"
    )
    page.click("#clear")
    assert page.inner_text("#talk") == "" and not complaints
