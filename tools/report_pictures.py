"""Screenshots of a report on a wide screen (in light and dark mode) and on a phone.

    python tools/report_pictures.py exp/tofugu/report/report.html docs/pictures

The script writes report-screen.png, report-dark.png and report-phone.png, each with sections of the page side
by side. It requires playwright and Chromium (extra dev; apt install chromium).
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image  # installed with matplotlib
from playwright.sync_api import Page, sync_playwright

# Name -> width and height of the window, and color scheme.
VIEWS = {"screen": (1100, 1500, "light"), "dark": (1100, 1500, "dark"), "phone": (390, 844, "light")}
SECTIONS = ("results", "units", "examples", "training")
MAX_WIDTH = 2000


def section_picture(page: Page, section: str) -> Image.Image:
    """Take a screenshot after following the link to a section. The first one shows the top of the page."""
    page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
    if section == SECTIONS[0]:
        page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(200)
    return Image.open(io.BytesIO(page.screenshot()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height, scheme) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(args.report.resolve().as_uri())
            page.wait_for_load_state()
            page.evaluate("document.querySelectorAll('#training details').forEach(part => part.open = true)")
            sections = [section for section in SECTIONS if page.query_selector(f"#{section}")]
            pictures = [section_picture(page, section) for section in sections]
            strip = Image.new("RGB", ((width + 20) * len(pictures) - 20, height), "#b0b7c0")
            for number, picture in enumerate(pictures):
                strip.paste(picture, ((width + 20) * number, 0))
            if strip.width > MAX_WIDTH:
                size = (MAX_WIDTH, round(strip.height * MAX_WIDTH / strip.width))
                strip = strip.resize(size, Image.Resampling.LANCZOS)
            path = args.out / f"report-{name}.png"
            strip.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
