"""`fdiff report`: one self-contained HTML page of one or several runs, from nothing but their folders.

`runs` reads a folder, `charts` draws (matplotlib, as SVG that takes the page's text colour), `page` puts it together.
"""

from fdiff.report.page import render
from fdiff.report.runs import Run, read_run

__all__ = ["Run", "read_run", "render"]
