"""A page in headless Chromium: how wide it is, what can be read on it, what it says on the console and asks for.

Scope: opening a file in Debian's or another installed Chromium through playwright, and a list of what is wrong with the
page. Tests are skipped, and say so, where there is no browser. Not here: what has to be on a page.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; skips the test where playwright or Chromium is missing."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A loaded page, everything folded open; what it logged, and what it asked for beside itself."""

    page: Any
    logged: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What is wrong: see CHECKS."""
        return [*self.logged, *self.asked, *self.page.evaluate(CHECKS)]


@contextmanager
def opened(browser: Any, path: Path | str, width: int, scheme: str) -> Iterator[Opened]:
    """A file, or an address of a server of ours, in a window of `width` pixels that prefers the colours of `scheme`."""
    own = path if isinstance(path, str) else path.name
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(60_000)
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.logged.append(f"console: {message.text}"))
    found.page.on("pageerror", lambda error: found.logged.append(f"error: {error}"))
    found.page.on("request", lambda request: found.asked.append(f"request: {request.url}"))
    found.page.goto(path if isinstance(path, str) else path.as_uri())
    found.asked = [line for line in found.asked if own not in line and "data:" not in line]
    found.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    yield found
    context.close()


CHECKS = """() => {
  const found = [], width = window.innerWidth;
  const name = one => `${one.tagName} ${one.className.baseVal ?? one.className} "${one.textContent.slice(0, 40)}"`;
  const whole = document.documentElement.scrollWidth;
  if (whole > width) found.push(`wide: the page, ${whole}`);
  for (const one of document.body.querySelectorAll('*')) {
    if (one.closest('.wide') && !one.matches('.wide')) continue;  // scrolls in its own box
    const box = one.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1)) found.push(`wide: ${name(one)}`);
  }
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect(), label = svg.getAttribute('aria-label');
    if (frame.width < 100 || frame.height < 60) found.push(`size: ${label}, ${frame.width} x ${frame.height}`);
    if (!svg.querySelector('path, use')) found.push(`empty: ${label}`);
    const texts = [...svg.querySelectorAll('text')].map(one => [one, one.getBoundingClientRect()]);
    texts.forEach(([one, box], i) => {
      if (box.left < frame.left - 2 || box.right > frame.right + 2) found.push(`cut: ${label}, ${one.textContent}`);
      if (parseFloat(getComputedStyle(one).fontSize) * frame.width / svg.viewBox.baseVal.width < 8)
        found.push(`small: ${label}, ${one.textContent}`);
      for (const [other, its] of texts.slice(i + 1)) {
        const across = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const down = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (across > 1 && down > 4) found.push(`overlap: ${label}, ${one.textContent} and ${other.textContent}`);
      }
    });
  }
  const ids = [...document.querySelectorAll('[id]')].map(one => one.id);
  if (new Set(ids).size < ids.length) found.push('ids: not unique');
  const light = color => {
    const part = x => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(part);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!color.endsWith(', 0)')) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  for (const one of document.body.querySelectorAll('*')) {
    if (![...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(one), ink = one.matches('text, tspan') ? style.fill : style.color;
    const [low, high] = [light(ink), light(behind(one))].sort((a, b) => a - b);
    const needed = one.matches('.legend b') ? 3 : 4.5, contrast = (high + .05) / (low + .05);
    if (contrast < needed) found.push(`contrast ${contrast.toFixed(2)}: ${name(one)}`);
  }
  return found;
}"""
