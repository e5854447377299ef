"""Whether a person can read a page: what in it is cut off, too small, too faint or on top of something else.

May import: tests.browser.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.browser import Chromium

SMALLEST_TEXT, SMALLEST_PRINT = 11, 8  # pixels

# What a reader would stumble over, as {kind: [where, ...]}. Everything that can be opened is open.
READ = """
(() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const width = document.documentElement.clientWidth, found = {};
  const note = (kind, element, value) => (found[kind] ??= []).push(`${element.textContent.trim().slice(0, 40)}: ${value}`);
  const shown = element => element.checkVisibility() && element.getBoundingClientRect().width > 0;
  const luminance = color => {
    const parts = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(x => x / 255);
    const [r, g, b] = parts.map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return "rgb(255, 255, 255)";
  };
  const goesOn = element => {  // whether a reader sees that what holds the element scrolls
    const style = element && getComputedStyle(element);
    return !!style && /auto|scroll/.test(style.overflowX) && /gradient.*local/.test(style.backgroundImage + style.backgroundAttachment);
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  if (document.documentElement.scrollWidth > width) found["wider than the window"] = [document.documentElement.scrollWidth];
  const texts = [...document.querySelectorAll("body *")].filter(element => shown(element) && !element.closest("svg")
    && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
  for (const element of texts) {
    const style = getComputedStyle(element);
    if (parseFloat(style.fontSize) < %(smallest)s) note("small", element, style.fontSize);
    const least = element.matches(".key") ? 3 : 4.5;  // WCAG 2.2, 1.4.11 and 1.4.3
    const ratio = contrast(style.color, background(element));
    if (ratio < least) note("faint", element, ratio.toFixed(2));
    const box = element.getBoundingClientRect();
    if (!goesOn(element.closest(".scroll")) && (box.right > width + 1 || box.left < -1)) note("cut off", element, box.right);
  }
  const pictures = [...document.querySelectorAll("svg")].filter(shown);
  for (const svg of pictures) {
    const frame = svg.getBoundingClientRect();
    if (frame.right > width + 1) note("cut off", svg.closest("figure"), frame.right);
    const labels = [...svg.querySelectorAll("text")].map(text => ({text, box: text.getBoundingClientRect()}));
    labels.forEach(({text, box}, index) => {
      const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
      if (size < %(smallest)s) note("small", text, size);
      if (contrast(getComputedStyle(text).fill, background(svg)) < 4.5) note("faint", text, getComputedStyle(text).fill);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        note("outside its picture", text, svg.ariaLabel);
      for (const other of labels.slice(index + 1))
        if (box.left < other.box.right && other.box.left < box.right && box.top < other.box.bottom && other.box.top < box.bottom)
          note("overlapping", text, `${other.text.textContent} in ${svg.ariaLabel}`);
    });
  }
  const scheme = getComputedStyle(document.body).backgroundColor;
  return {found, pictures: pictures.length, texts: texts.length, scheme, body: document.body.innerText};
})()
"""


def reading_script(smallest: int = SMALLEST_TEXT) -> str:
    """A script whose value says what is wrong with the page (`found`), how many texts and pictures it shows, and what its text is."""
    return READ % {"smallest": smallest}


def read_page(chromium: Chromium, page: Path, width: int, *, dark: bool = False, media: str = "screen") -> dict[str, Any]:
    """The script's value for a page that must not complain, or ask for anything but itself."""
    script = reading_script(SMALLEST_TEXT if media == "screen" else SMALLEST_PRINT)
    visit = chromium.visit(page, width=width, dark=dark, media=media, script=script)
    assert visit.complaints == []
    assert visit.requests == [page.absolute().as_uri()]
    return dict(visit.result)
