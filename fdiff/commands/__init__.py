"""The command line: `main.py` starts everything, `flags.py` parses, and each command has a module of its own.

A command is a function `run` whose parameters are its flags. No other room imports this one.
"""

from fdiff.runtime import cpp_log  # before `main` imports torch
