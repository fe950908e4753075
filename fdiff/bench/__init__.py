"""What `fdiff bench` measures: one module a measurement, each beside a baseline or a bound, in one run.

Open `measure.py` first: how two things are timed in turns. `README.md` has the figures.
"""
