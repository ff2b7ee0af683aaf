"""The pages in a headless Chromium: nothing is asked of a network, nothing overflows, and all of it can be read."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fake_run import fake_run, write_tasks
from moeslim.report.collect import collect
from moeslim.report.compare import comparison_page
from moeslim.report.page import page
from moeslim.study.tasks import compare_tasks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: neither chromium nor google-chrome")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--proxy-server=http://127.0.0.1:9", "--dump-dom",
]  # fmt: skip
"""A proxy that nobody answers at: whatever gets out of the page fails and is told on the console."""

LOOK = """
const told = [];
function light(text) {
  const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
  const part = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  return {a, y: .2126 * part(r) + .7152 * part(g) + .0722 * part(b)};
}
for (const frame of document.querySelectorAll("iframe")) {
  const doc = frame.contentDocument, win = frame.contentWindow, root = doc.documentElement;
  const all = [...doc.body.querySelectorAll("*")], bad = [], size = frame.clientWidth;
  const behind = e => { for (; e; e = e.parentElement) {
    const c = light(win.getComputedStyle(e).backgroundColor); if (c.a == 1) return c; } };
  for (const e of all) {
    const style = win.getComputedStyle(e), box = e.getBoundingClientRect();
    const words = [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    const seen = !e.closest("details:not([open])") || e.tagName == "SUMMARY";
    if (words && seen && e.tagName != "title") {
      const [a, b] = [light(e.closest("svg") ? style.fill : style.color), behind(e)];
      const ratio = (Math.max(a.y, b.y) + .05) / (Math.min(a.y, b.y) + .05);
      if (ratio < 4.5) bad.push(["contrast " + ratio.toFixed(2), e.tagName, e.textContent]);
      const scale = e.closest("svg") ? e.getScreenCTM().a : 1;
      if (scale * parseFloat(style.fontSize) < (e.closest(".grid-svg") ? 8 : 9.5)) bad.push(["small", e.textContent]);
    }
    if (seen && (box.right > size + 1 || box.left < -1) && !e.closest(".scroll, .pan, pre, .sample"))
      bad.push(["outside", e.tagName, e.className.baseVal ?? e.className, Math.round(box.right)]);
    if (e.tagName == "svg" && (e.getAttribute("role") != "img" || !e.getAttribute("aria-label") || box.height < 8))
      bad.push(["a picture without name or size", e.getAttribute("aria-label")]);
    if (e.matches("a[href^='#']") && !doc.querySelector(e.getAttribute("href"))) bad.push(["leads nowhere", e.href]);
  }
  told.push({name: frame.name, wide: root.scrollWidth, size, bad: bad.slice(0, 9), paper: win.getComputedStyle(doc.body)
    .backgroundColor, lang: root.lang, title: doc.title, sections: [...doc.querySelectorAll("section")].map(s => s.id),
    pictures: doc.querySelectorAll("svg").length, rows: doc.querySelectorAll("tr").length,
    scrolled: [...doc.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth).length});
}
const out = document.createElement("pre"); out.id = "told"; out.textContent = JSON.stringify(told);
document.body.append(out);
"""


def look(pages: dict[str, str], tmp_path: Path, *, dark: bool = False) -> tuple[list[dict[str, Any]], str]:
    """Each page in frames of a laptop's and a phone's width: what the browser made of it, and its console."""
    frames = "".join(
        f'<iframe name="{name} {width}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in (1280, 390)
    )
    path = tmp_path / "frames.html"
    path.write_text(f'<!doctype html><meta charset="utf-8">{frames}<script>onload = () => {{{LOOK}}}</script>')
    place = [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [str(CHROMIUM), *FLAGS, *place, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = done.stdout.partition('<pre id="told">')[2].partition("</pre>")[0]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(told)), console


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page of a run with everything on it, and that of two runs side by side."""
    folder = fake_run(tmp_path_factory.mktemp("browser") / "run", log_every=9)
    write_tasks(folder / "records" / "tasks")
    facts = collect(folder)
    share = {"value": -0.021, "se": 0.004, "n": 12, "unit": "share"}
    apart = {"bits_per_byte": {"python": {**share, "unit": "bits/byte"}}, "top1": {"speeches": share}}
    first, other = "one/distilled", "a-run-of-a-long-name/distilled"
    scores = folder / "records" / "tasks" / "distilled.json"
    tasks, _ = compare_tasks({first: scores, other: scores})
    record = {"baseline": first, "differences": {other: apart}, "tasks": tasks, "lines": []}
    runs = {"one": facts, "a-run-of-a-long-name": facts}
    return {"run": page(facts), "compare": comparison_page(record, facts.records, runs=runs)}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_pages_can_be_read_on_a_laptop_and_on_a_phone(pages: dict[str, str], tmp_path: Path, dark: bool) -> None:
    found, console = look(pages, tmp_path, dark=dark)
    assert console == ""
    assert [frame["name"] for frame in found] == ["run 1280", "run 390", "compare 1280", "compare 390"]
    for frame in found:
        assert frame["wide"] <= frame["size"], frame["name"]
        assert frame["bad"] == [], frame["name"]
        assert frame["lang"] == "en"
        assert frame["title"].endswith(" · moeslim")
        assert (sum(map(int, frame["paper"][4:-1].split(","))) < 200) == dark
    run = ["results", "tasks", "stages", "cut", "training", "drafts", "sizes", "load", "samples", "run"]
    assert [frame["sections"] for frame in found[:2]] == [run, run]
    assert found[2]["sections"] == ["differences", "results", "tasks", "training", "recipes"]
    assert found[0]["pictures"] == found[1]["pictures"] == pages["run"].count("<svg") > 15
    assert found[0]["rows"] == pages["run"].count("<tr") > 60
    assert found[1]["scrolled"] >= 2  # on a phone tables scroll in their boxes
    assert found[0]["scrolled"] == 0


def test_what_would_be_loaded_is_refused_and_told(pages: dict[str, str], tmp_path: Path) -> None:
    """The page forbids itself to load or run anything; that the console is read is shown by what it says here."""
    evil = '<img src="http://evil.example/x.png"><script>document.title = "ran"</script>'
    wide = '<p style="width:2000px;color:#fff;background:#fff">too wide</p>'
    found, console = look({"run": pages["run"].replace("</main>", evil + wide + "</main>")}, tmp_path)
    assert "evil.example" in console
    assert console.count("Content Security Policy") >= 2
    assert found[1]["title"] != "ran"
    assert found[1]["wide"] >= 2000
    assert {entry[0].split()[0] for entry in found[1]["bad"]} == {"contrast", "outside"}
