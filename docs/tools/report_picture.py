"""Take README's picture of a report: docs/figures/report.png, by a headless Chromium.

Command:  python docs/tools/report_picture.py [BROWSER]

The page is of the records of README's table. BROWSER defaults to the first of BROWSERS that is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tempering.reports.page import write_page
from tempering.reports.records import load_runs

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "evidence-short" / "records"
LABELS = ("student alone", "KD", "KD, weight-matched", "DTKD published", "DTKD exact")
PICTURE = ROOT / "docs" / "figures" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = "1240,1130"  # pixels: the verdict, the cards, every seed and the differences


def main(browser: str | None) -> None:
    if browser is None:
        sys.exit(f"no browser found; install one of {', '.join(BROWSERS)}, or name its command: {sys.argv[0]} BROWSER")
    runs = [run for run in load_runs([RECORDS]) if run.label in LABELS]
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(runs, Path(folder, "report.html"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE}"]
        command = [browser, *flags, f"--screenshot={PICTURE}", page.as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else next(filter(None, map(shutil.which, BROWSERS)), None))
