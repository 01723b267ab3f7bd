"""A real browser for the tests of pages: Debian's chromium, driven by playwright.

Where it is missing and can be installed, it is.
"""

import os
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL_S = 300
"""Seconds that the installation of a browser may take; 25 on a machine with a near mirror."""


def find_browser():
    """The path of a browser, installed where it must be; skips where it cannot be."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found:
        return found
    if os.name != "posix" or os.getuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("there is no chromium, and only root can install one with apt-get")
    # Another process of the same run of tests may be at it: it is waited for.
    apt = f"apt-get -o DPkg::Lock::Timeout={INSTALL_S}"
    install = f"{apt} install -y --no-install-recommends chromium"
    command = f"{install} || ({apt} update && {install})"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=INSTALL_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        pytest.skip(f"there is no chromium, and it could not be installed: {error}")
    return shutil.which("chromium") or pytest.skip("apt-get installed no chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path)
        yield started
        started.close()
