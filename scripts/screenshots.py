"""Pictures of a report page as a person would see it: desktop and phone, light and dark.

    python -m mixlora.report run=RUN_FOLDER                        makes the report.html of a run again
    python scripts/screenshots.py RUN_FOLDER/report.html FOLDER [--most 1600] [--browser chromium]

Writes FOLDER/{desktop,phone}-{light,dark}.png; needs Chromium or Chrome, and no network.
"""

import argparse
import html
import re
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = {"light": 1, "dark": 0}  # as Blink numbers them
# A window of the browser has a least width that a phone does not have; a frame has none.
FRAME = """<iframe srcdoc="{page}" style="width: {width}px; height: 800px; border: 0" onload="
const page = this.contentDocument.documentElement; document.title = page.scrollWidth + ' x ' + page.scrollHeight
"></iframe>"""


def browse(browser: str, page: Path, width: int, height: int, scheme: str, *switches: str) -> str:
    """Open the page in a window of this size; returns what the browser printed."""
    look = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", look]
    line += [f"--window-size={width},{height}", *switches, page.resolve().as_uri()]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def size_of(browser: str, page: Path, width: int) -> tuple[int, int]:
    """(width, height) of the whole page in a window of this width."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            FRAME.format(page=html.escape(page.read_text(encoding="utf-8")), width=width), encoding="utf-8"
        )
        found = re.search(r"<title>(\d+) x (\d+)", browse(browser, frame, 1280, 800, "light", "--dump-dom"))
    assert found, f"{page} did not tell its size"
    return int(found[1]), int(found[2])


def pictures(browser: str, page: Path, folder: Path, most: int | None) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device, width in WIDTHS.items():
        height = min(size_of(browser, page, width)[1], most or 16_000)
        for scheme in SCHEMES:
            path = (folder / f"{device}-{scheme}.png").resolve()
            browse(browser, page, width, height, scheme, f"--screenshot={path}")
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
                    path, optimize=True
                )  # a third of the bytes
            written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, help="cut the pictures off below so many pixels")
    parser.add_argument("--browser", default="chromium")
    given = parser.parse_args()
    for path in pictures(given.browser, given.page, given.folder, given.most):
        print(path)


if __name__ == "__main__":
    main()
