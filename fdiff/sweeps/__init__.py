"""`fdiff sweep`: a grid of runs from a YAML file, what is complete of it, and the table of scores and costs.

Open `grid.py` first: it reads the file. `running.py` trains and scores one cell, `results.py` says what its folder
holds, `table.py` formats, `costs.py` says before what a sweep takes. The YAML files are the paper's grids and its open
questions; `README.md` has their tables.
"""

from fdiff.sweeps.costs import costs_table
from fdiff.sweeps.grid import Cell, Sweep, find, read
from fdiff.sweeps.results import Result, result
from fdiff.sweeps.running import bring_to_end, check_before_training, with_image_shapes
from fdiff.sweeps.table import as_csv, as_latex, as_text
