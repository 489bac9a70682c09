"""Screenshots of a report on a wide screen (in light and dark mode) and on a phone.

    python tools/report_pictures.py exp/demo/report/report.html docs/pictures

The script writes report-screen.png, report-dark.png and report-phone.png, each with sections of the page side
by side. The script requires playwright (extra dev) and Chromium (apt install chromium).
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image  # installed with matplotlib
from playwright.sync_api import Page, sync_playwright

# Name -> width and height of the window, color scheme, and sections of the page.
VIEWS = {
    "screen": (880, 1000, "light", ("results", "examples")),
    "dark": (880, 1000, "dark", ("results", "examples")),
    "phone": (390, 844, "light", ("results", "units", "examples", "training")),
}


def section_picture(page: Page, section: str) -> Image.Image:
    """Take a screenshot of the page, scrolled to a section or, for the results, to the top."""
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
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height, scheme, sections) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(args.report.resolve().as_uri())
            page.wait_for_load_state()
            page.evaluate("document.querySelectorAll('#training details').forEach(part => part.open = true)")
            present = [section for section in sections if page.query_selector(f"#{section}")]
            pictures = [section_picture(page, section) for section in present]
            strip = Image.new("RGB", ((width + 20) * len(pictures) - 20, height), "#b0b7c0")
            for number, picture in enumerate(pictures):
                strip.paste(picture, ((width + 20) * number, 0))
            path = args.out / f"report-{name}.png"
            strip.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
