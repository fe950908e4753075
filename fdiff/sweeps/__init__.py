"""`fdiff sweep`: a grid of runs from a YAML file, what is complete of it, and the table of scores and costs.

`grid` reads the file, `running` trains and scores a cell, `results` says what its folder holds, `table` formats; the
YAML files beside are the paper's.
"""

from fdiff.sweeps.grid import Cell, Sweep, find, read
from fdiff.sweeps.results import Result, result
from fdiff.sweeps.running import bring_to_end
from fdiff.sweeps.table import as_csv, as_latex, as_text

__all__ = ["Cell", "Result", "Sweep", "as_csv", "as_latex", "as_text", "bring_to_end", "find", "read", "result"]
