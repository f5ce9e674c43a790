"""report.html: what each stage of the refinery took away, as bars, and samples of it. One file, nothing is loaded."""

from __future__ import annotations


def page(report):
    return "<html></html>"
