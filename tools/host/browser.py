"""What the browser test needs: a Chromium, Node.js, and playwright-core to drive the one from the other."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import places
from .install import run_logged
from .places import SetupError
from .steps import Steps

PLAYWRIGHT = "1.65.1"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


@dataclass(frozen=True)
class Browser:
    chromium: Path
    node: Path
    playwright: Path  # the folder of playwright-core


def find_browser() -> Browser | str:
    """All three, or the reason why not."""
    chromium, node = _chromium(), shutil.which("node")
    if chromium is None:
        return "no Chromium: ./tools/test --with-browser installs one"
    if node is None:
        return "no Node.js: install the package nodejs"
    if _playwright_version() is None:
        return "no playwright-core: ./tools/test --with-browser installs it"
    return Browser(chromium, Path(node), _playwright())


def ensure_browser(steps: Steps) -> None:
    """Install what `find_browser` misses: Chromium with apt when we are root, playwright-core with npm."""
    if _chromium() is None:
        with steps.step("install Chromium"):
            _install_chromium()
    if _playwright_version() != PLAYWRIGHT:
        with steps.step(f"install playwright-core {PLAYWRIGHT}"):
            _install_playwright()


def _chromium() -> Path | None:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return Path(found) if found else None


def _install_chromium() -> None:
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise SetupError("the browser test needs Chromium: install the package chromium, or run this as root")
    run_logged([apt, "update"], "apt-get update failed")
    packages = ("chromium", "fonts-dejavu-core")
    run_logged(
        [apt, "install", "-y", "--no-install-recommends", *packages], "apt-get could not install Chromium"
    )


def _playwright() -> Path:
    return places.hosts_dir() / "ui" / "node_modules" / "playwright-core"


def _playwright_version() -> str | None:
    file = _playwright() / "package.json"
    return json.loads(file.read_text())["version"] if file.is_file() else None


def _install_playwright() -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise SetupError("the browser test needs npm: install the packages nodejs and npm")
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", places.hosts_dir() / "ui"]
    run_logged([*command, f"playwright-core@{PLAYWRIGHT}"], "npm could not install playwright-core")
