"""One module a command of `fdiff`; the signature of its `run` is the single list of the command's own flags."""
