"""Pictures of a report, as a screen and as a phone show it.

    python tools/report_pictures.py exp/tofugu/report/report.html docs/pictures

Writes report-screen.png and report-phone.png, each the sections of the page side by side.
Needs playwright and a chromium (extra dev; apt install chromium).
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image  # matplotlib brings it
from playwright.sync_api import Page, sync_playwright

VIEWS = {"screen": (1100, 1500), "phone": (390, 844)}  # width and height of the window
SECTIONS = ("results", "training", "units", "worst")


def column(page: Page, section: str) -> Image.Image:
    """What is seen after a tap on the link to a section."""
    page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
    if section == "results":
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
        system = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        for name, (width, height) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(args.report.resolve().as_uri())
            page.wait_for_load_state()
            columns = [column(page, section) for section in SECTIONS]
            strip = Image.new("RGB", ((width + 20) * len(columns) - 20, height), "#b0b7c0")
            for number, picture in enumerate(columns):
                strip.paste(picture, ((width + 20) * number, 0))
            if strip.width > 2000:
                strip = strip.resize((2000, round(strip.height * 2000 / strip.width)), Image.LANCZOS)
            path = args.out / f"report-{name}.png"
            strip.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
