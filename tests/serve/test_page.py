"""Tests the page in a real browser, with a camera and a microphone that play a clip."""

import time

import pytest
from selenium.webdriver import ActionChains, Keys

from tests.support.served import serve
from tools.browser import BROWSER, open_browser, write_devices

TOKEN = "let me in"
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@pytest.fixture(scope="module")
def server(trained):
    with serve(trained, "--config.predict.max_new_tokens=24", "--name=tiny", token=TOKEN) as served:
        yield served


@pytest.fixture(scope="module")
def devices(synthetic, tmp_path_factory):
    return write_devices(next(synthetic.raw.rglob("*.mp4")), tmp_path_factory.mktemp("devices"))


@pytest.fixture
def browser(devices, tmp_path):
    driver = open_browser(tmp_path / "profile", devices)
    yield driver
    driver.quit()


class Page:
    """What a person does with the page."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server
        driver.get(f"{server.url}/#token=let%20me%20in")
        self.wait(lambda: driver.execute_script("return Boolean(state.about)"))

    def wait(self, until, seconds=60):
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.05)

    def one(self, css):
        return self.driver.find_element("css selector", css)

    def text(self, css):
        return self.one(css).text

    def turns(self):
        return self.driver.find_elements("css selector", ".turn")

    def idle(self):
        return not self.driver.execute_script("return Boolean(state.busy)")

    def say(self, words):
        before = len(self.turns())
        self.one("#text").send_keys(words + "\n")
        self.wait(lambda: len(self.turns()) == before + 2 and self.idle())

    def record(self, seconds, by="pointer"):
        """Holds the button, or presses a key (once to begin, once to end), or clicks as screen
        readers do."""
        actions, button = ActionChains(self.driver), self.one("#record")
        if by == "pointer":
            actions.click_and_hold(button).pause(seconds).release().perform()
        elif by == "click":
            for _ in range(2):
                self.driver.execute_script("arguments[0].click()", button)
                time.sleep(seconds)
        else:
            self.driver.execute_script("arguments[0].focus()", button)
            actions.send_keys(by).pause(seconds).send_keys(by).perform()
        self.wait(lambda: self.one("#clip").is_displayed())
        assert not self.driver.execute_script("return Boolean(state.recorder)")

    def history(self):
        name = self.driver.execute_script("return state.id")
        return self.server.ask(f"/v1/conversations/{name}")[1]["history"]


def test_a_person_records_sends_and_goes_on(browser, server):
    page = Page(browser, server)
    assert "a machine" in page.text("#notice")
    # Nothing is turned on before the first consent.
    page.one("#mode-video").click()
    assert page.one("#consent").is_displayed()
    page.one("#consent-no").click()
    page.wait(lambda: page.one("#mode-text").get_attribute("aria-pressed") == "true")
    assert not page.one("#record").is_displayed()
    page.one("#mode-video").click()
    page.one("#consent-yes").click()
    page.wait(lambda: page.one("#record").is_displayed())
    page.wait(
        lambda: browser.execute_script("return document.querySelector('#preview').videoWidth")
    )
    page.record(2.0)
    page.say("Look at me.")
    mine, reply = page.turns()
    assert "Look at me." in mine.text
    assert "pictures and" in mine.text  # seen and heard
    assert "s of sound" in mine.text
    assert mine.text.count("%") == 3
    labels = page.history()
    assert labels[0]["text"] == "Look at me."
    assert labels[0]["emotion"] in mine.text
    assert labels[1]["strategy"] in reply.text
    assert labels[1]["text"][:20].strip() in reply.text
    # Voice alone.
    page.one("#mode-audio").click()
    page.wait(lambda: page.one("#level").is_displayed())
    for by in (Keys.SPACE, Keys.ENTER, "click"):
        page.record(1.0, by)
        page.one("#clip-drop").click()
    page.record(1.5)
    page.one("#send").click()
    page.wait(lambda: len(page.turns()) == 4 and page.idle())
    assert "(a clip)" in page.turns()[2].text
    assert "pictures" not in page.turns()[2].text
    # The second turn knows the first: the conversation is one, and survives a reload.
    assert [row["speaker"] for row in page.history()] == ["client", "therapist"] * 2
    page = Page(browser, server)
    page.wait(lambda: len(page.turns()) == 4)
    page.one("#undo").click()
    page.wait(lambda: len(page.turns()) == 2)
    assert len(page.history()) == 2
    page.say("I want to kill myself.")
    assert "findahelpline.com" in page.turns()[-1].text
    old = browser.execute_script("return state.id")
    page.one("#new").click()
    page.wait(lambda: not page.turns())
    page.say("A new beginning.")
    assert len(page.history()) == 2
    assert len(page.server.ask(f"/v1/conversations/{old}")[1]["history"]) == 4
    page.one("#delete").click()
    browser.switch_to.alert.accept()
    page.wait(lambda: not page.turns())
    assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def test_files_keys_and_themes(browser, server, synthetic):
    page = Page(browser, server)
    page.one("#file").send_keys(str(next(synthetic.raw.rglob("*.mp4"))))
    page.wait(lambda: page.one("#clip").is_displayed())
    page.one("#send").click()
    page.wait(lambda: len(page.turns()) == 2 and page.idle())
    assert "pictures" in page.turns()[0].text
    # What cannot be read is said, and the words stay.
    bad = browser.execute_script(
        "setClip(new Blob(['nonsense'], {type: 'video/webm'}), 'bad.webm'); return state.clip.name"
    )
    assert bad == "bad.webm"
    page.one("#text").send_keys("My words.\n")
    page.wait(lambda: page.one("#error").is_displayed())
    assert "cannot be used" in page.text("#error")
    assert len(page.turns()) == 2
    assert page.one("#text").get_attribute("value") == "My words."
    page.one("#about-open").click()
    assert "false alarms" in page.text("#about")
    page.one("#about-close").click()
    for theme in ("light", "dark"):
        browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        for width in (390, 1280):
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
            )
            assert browser.execute_script("return innerWidth") == width
            # Nothing is cut off at the side, and everything that is pressed has a name.
            assert browser.execute_script("return document.body.scrollWidth <= innerWidth")
            assert browser.execute_script(
                "return [...document.querySelectorAll('button')].every("
                "(b) => (b.textContent.trim() || b.ariaLabel) && true)"
            )


def test_a_token_is_asked_for(browser, server):
    browser.get(server.url)
    end = time.monotonic() + 20

    def until(done):
        while not done():
            assert time.monotonic() < end
            time.sleep(0.05)

    for token in ("wrong", TOKEN):
        until(lambda: browser.find_element("css selector", "#login").is_displayed())
        browser.find_element("css selector", "#token").send_keys(token + "\n")
    until(lambda: browser.execute_script("return Boolean(state.about)"))
    assert TOKEN not in browser.current_url
