"""A page of HTML that is one file and asks nothing of the network.

Styles and scripts are package files and are put inside; a content security policy with their hashes lets nothing else
run or load. What is shown is data for the scripts, never markup.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import memseg


def single_file(name: str, *, scripts: Sequence[str], title: str, data: dict[str, Any]) -> str:
    """The page.

    Args:
        name: Of its template and its own style among the package's assets.
        scripts: Assets, run as one script in this order.
        title: Of the window.
        data: What the scripts read.
    """
    style = asset("base.css") + asset(f"{name}.css")
    script = "\n".join(['(() => {\n"use strict";', *(asset(f"{one}.js") for one in scripts), "})();"])
    return Template(asset(f"{name}.html")).substitute(
        title=escape(title),
        version=escape(memseg.__version__),
        style=style,
        style_hash=policy_hash(style),
        script=script,
        script_hash=policy_hash(script),
        # The only way out of a script element begins with this letter.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def asset(name: str) -> str:
    """A file of the package that is put into pages."""
    return (files("memseg.reports") / "assets" / name).read_text(encoding="utf-8")


def policy_hash(content: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
