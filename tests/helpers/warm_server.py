"""Processes forked from a server that has loaded torch and fdiff already, so that one costs no seconds of imports.

There is one server for each process that runs tests. What is forked shares no open file and no thread with the test.
"""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "docstring_parser",
        "fdiff.commands.main",
        "fdiff.commands.evaluate",
        "fdiff.commands.train",
        "fdiff.comm.torch_dist",
        "fdiff.evaluation.scoring",
        "pytest",
        "torch._dynamo",  # which the first step of an optimizer imports
        "torch.utils.tensorboard",
        "torchvision.utils",  # which the first grid of samples imports
    ]
)
