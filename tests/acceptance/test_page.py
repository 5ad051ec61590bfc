"""The page of the API in a browser, on screens of several widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from api.openapi import page
from api.openapi.document import document

CHROMIUM = shutil.which("chromium")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-quic",
]
QUIET += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=60000"]
# Collects the names that continue in another line, unless after a slash, and what a reader would have to scroll to.
SCRIPT = """
addEventListener("load", () => {
  const view = document.querySelector("iframe").contentWindow, page = view.document, broken = new Set();
  for (const element of page.querySelectorAll("code, a, th")) {
    if (element.closest("pre")) continue;
    const texts = page.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const node = texts.currentNode, text = node.data, range = page.createRange();
      let before = null;
      for (let i = 0; i < text.length; i++) {
        range.setStart(node, i);
        range.setEnd(node, i + 1);
        const top = /\\s/.test(text[i]) ? null : range.getBoundingClientRect().top;
        if (before !== null && top !== null && Math.abs(top - before) > 4 && text[i - 1] !== "/") broken.add(text);
        before = top;
      }
    }
  }
  const found = {
    width: view.innerWidth,
    names: page.querySelectorAll("code").length,
    broken: [...broken],
    outside: [...page.querySelectorAll("*")].filter(
      (one) => one.getBoundingClientRect().right > view.innerWidth && !one.closest("pre")
    ).length,
  };
  document.body.textContent = JSON.stringify(found);
});
"""


def shown(text: str, width: int, directory: Path) -> Any:
    """Return what a reader sees of a page on a screen with this width."""
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
    outer = directory / "outer.html"
    outer.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}<script>{SCRIPT}</script></body>')
    command = [CHROMIUM or "", *QUIET, f"--user-data-dir={directory}/user", "--dump-dom", outer.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    body = re.search(r"<body>(\{.*\})</body>", dom)
    assert body, dom[-2000:]
    return json.loads(html.unescape(body[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_a_name_of_the_page_stays_on_one_line(width: int, tmp_path: Path) -> None:
    found = shown(page.page(document()), width, tmp_path)
    assert found["names"] > 500
    assert {name: found[name] for name in ("width", "broken", "outside")} == {
        "width": width,
        "broken": [],
        "outside": 0,
    }
