"""The page in a real browser: one start drives three pages, because a start costs seconds."""

from __future__ import annotations

import html as entities
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from mitigate.report.html import render
from mitigate.report.samples import choose_samples
from tests.report.test_page import hostile_page
from tests.report.worlds import HOSTILE, Words, World, made_comparison

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome is installed")

#: Addresses the filters are tried with.
HASHES = {
    "nothing": "",
    "all": "#show=all",
    "changed": "#show=changed",
    "fixed": "#show=fixed",
    "broken": "#show=broken",
    "other stack": "#show=fixed&stack=unsure",
    "stack": "#show=all&stack=good",
    "task": "#show=all&task=yes_no",
    "category": "#show=all&category=topic%3Danimals",
    "text": "#show=all&q=BIRD",
    "together": "#show=fixed&task=caption&q=cat",
    "no match": "#q=zebra",
    "unknown": "#show=sideways&stack=nobody&task=%3Cscript%3E",
    "section": "#provenance",
}

#: Loads the pages in frames of a phone's width, moves through the addresses, and writes what is seen.
DRIVER = """<!doctype html><title>driver</title><body><script>
const hashes = HASHES, seen = {filters: {}, pages: {}};
const load = (name) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style = "width: 390px; height: 800px";
  frame.onload = () => done(frame);
  frame.src = name;
  document.body.append(frame);
});
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const look = (page) => ({
  visible: [...page.querySelectorAll(".sample")].filter((item) => item.offsetParent).map((item) =>
    item.querySelector(".id").textContent.split(" ")[0]),
  sheets: [...page.querySelectorAll(".sheet")].filter((item) => item.offsetParent).length,
  givers: [...new Set([...page.querySelectorAll(".giver")].filter((item) => item.offsetParent)
    .map((item) => item.dataset.stack))],
  count: page.getElementById("count").textContent,
});
(async () => {
  for (const name of ["page.html", "hostile.html", "bare.html"]) {
    const frame = await load(name), view = frame.contentWindow, page = frame.contentDocument;
    for (const item of page.querySelectorAll("details")) item.open = true;
    for (const kind of ["mouseover", "focus", "click"])
      for (const item of page.querySelectorAll("body *")) item.dispatchEvent(new view.Event(kind, {bubbles: true}));
    await pause(50);
    const root = page.documentElement;
    seen.pages[name] = {title: page.title, wide: root.scrollWidth, width: view.innerWidth,
      errors: view.eval ? 0 : 1, unnamed: [...page.querySelectorAll("select, input, button")].filter((item) =>
        !(item.labels && item.labels.length) && !item.textContent.trim()).length};
    if (name !== "page.html") continue;
    const form = page.getElementById("filters");
    for (const [key, hash] of Object.entries(hashes)) {
      view.location.replace("page.html" + (hash || "#show=all"));
      await pause(30);
      seen.filters[key] = look(page);
    }
    form.elements.q.value = "question";
    form.elements.q.dispatchEvent(new view.Event("input", {bubbles: true}));
    await pause(200);
    seen.typed = {...look(page), hash: view.location.hash};
    form.reset();
    await pause(50);
    seen.cleared = {...look(page), hash: view.location.hash};
    seen.status = page.getElementById("count").getAttribute("role");
    seen.stopped = [...page.querySelectorAll("#filters input, #filters select, #filters button")]
      .filter((item) => item.tabIndex < 0).length;
  }
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.replaceChildren(out);
})();
</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("browser")
    choice = choose_samples(Words(), World().runs(), "none")
    long = made_comparison()
    long["stacks"]["a_stack_with_a_name_that_no_phone_has_room_for_in_one_line"] = long["stacks"]["good"]
    hostile = hostile_page(" ".join(HOSTILE)).encode("utf-8", "backslashreplace").decode()
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", hostile)
    assert bare != hostile  # without the policy, escaping stands alone
    for name, text in {
        "page.html": render(long, choice, Words()),
        "hostile.html": hostile,
        "bare.html": bare,
        "driver.html": DRIVER.replace("HASHES", json.dumps(HASHES)),
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom",
        (folder / "driver.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(entities.unescape(found[1])), "console": console}


def test_the_address_chooses_the_samples(seen: Mapping[str, Any]) -> None:
    shown = {key: set(look["visible"]) for key, look in seen["filters"].items()}
    everything = {"p1/fixed", "p1/question", "p2/broken", "p3/changed", "p4/same", "p5/same"}
    assert shown["nothing"] == shown["all"] == shown["stack"] == everything
    assert shown["changed"] == {"p1/fixed", "p1/question", "p2/broken", "p3/changed"}
    assert shown["fixed"] == {"p1/fixed", "p1/question"}
    assert shown["broken"] == {"p2/broken"}
    assert shown["other stack"] == set()
    assert shown["task"] == {"p1/question"}
    assert shown["category"] == everything - {"p1/question"}
    assert shown["text"] == {"p5/same"}
    assert shown["together"] == {"p1/fixed"}
    assert shown["no match"] == set()
    assert shown["unknown"] == everything


def test_a_link_to_a_section_changes_no_filter(seen: Mapping[str, Any]) -> None:
    assert seen["filters"]["section"]["visible"] == seen["filters"]["unknown"]["visible"]


def test_pictures_without_a_sample_go_and_the_count_is_said(seen: Mapping[str, Any]) -> None:
    assert seen["filters"]["fixed"]["sheets"] == 1
    assert seen["filters"]["fixed"]["count"] == "2 of the 6 samples on this page match."
    assert seen["filters"]["no match"]["count"] == "No sample on this page matches; clear a filter."
    assert seen["status"] == "status"


def test_a_chosen_stack_stands_beside_the_baseline_alone(seen: Mapping[str, Any]) -> None:
    assert set(seen["filters"]["all"]["givers"]) == {"none", "good", "unsure"}
    assert set(seen["filters"]["stack"]["givers"]) == {"none", "good"}


def test_typing_and_clearing_are_kept_in_the_address(seen: Mapping[str, Any]) -> None:
    assert seen["typed"]["visible"] == ["p1/question"]
    assert seen["typed"]["hash"] == "#show=all&q=question"
    assert len(seen["cleared"]["visible"]) == 6
    assert seen["cleared"]["hash"] == "#show=all"


def test_every_control_has_a_name_and_the_keyboard_reaches_it(seen: Mapping[str, Any]) -> None:
    assert seen["pages"]["page.html"]["unnamed"] == 0
    assert seen["stopped"] == 0


@pytest.mark.parametrize("page", ["page.html", "hostile.html", "bare.html"])
def test_a_phone_need_not_scroll_sideways(seen: Mapping[str, Any], page: str) -> None:
    assert seen["pages"][page]["width"] == 390
    assert seen["pages"][page]["wide"] <= 390


def test_hostile_text_stays_text_with_and_without_the_policy(seen: Mapping[str, Any]) -> None:
    assert seen["pages"]["hostile.html"]["title"].endswith("– mitigate")
    assert seen["pages"]["bare.html"]["title"] == seen["pages"]["hostile.html"]["title"]
    assert "owned" in seen["pages"]["bare.html"]["title"]  # as text: the whole of it, not what a script set


def test_the_browser_has_nothing_to_complain_about(seen: Mapping[str, Any]) -> None:
    assert seen["console"] == []
