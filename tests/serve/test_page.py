"""The page at ``/``, in a browser."""

import shutil

import pytest

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_chat_in_a_browser(running, browser):
    page = browser.new_page()
    errors, hosts = [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(running.url)
    page.wait_for_function("document.getElementById('model').textContent == 'tiny'")
    page.fill("#text", "Hello <b>there</b>")
    page.click("#send")
    page.wait_for_function("document.getElementById('total').textContent != ''")
    [session] = [x for x in running.server.sessions.of("") if x.is_named]
    assert page.inner_text(".user") == "Hello <b>there</b>"  # as text
    assert page.inner_text(".assistant").split() == session.reply.split()
    shown = page.inner_text("#fill")
    assert (
        shown
        == f"{session.num_in_sight} of {running.server.window + len(session.content.stream.prefix)} tokens in sight"
    )
    assert page.locator("#ring span").count() == 3  # system prompt, question, reply
    assert "tokens/s" in page.inner_text("#speed")

    page.fill("#text", "<|end|>")  # an error is shown, and the chat goes on
    page.press("#text", "Enter")
    page.wait_for_selector(".error")
    assert "special tokens" in page.inner_text(".error")
    page.fill("#text", "More")
    page.press("#text", "Enter")
    page.wait_for_function(
        "document.querySelectorAll('.assistant').length == 3 && document.getElementById('stop').hidden"
    )
    assert page.locator(".assistant").last.inner_text()

    page.click("#new")
    assert page.locator("#chat div").count() == 0
    assert not errors
    assert hosts == {running.url.split("/")[2]}
    page.close()
