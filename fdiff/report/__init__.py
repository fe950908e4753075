"""`fdiff report`: one self-contained HTML page of one or several runs, from nothing but their folders.

Open `page.py` first: it puts the page together. `runs.py` reads a run's folder, `facts.py` makes the tables, `grids.py`
cuts the sample grids, `charts.py` draws with matplotlib, as SVG in the page's text colour.
"""

from fdiff.report.page import render
from fdiff.report.runs import Run, read_run
