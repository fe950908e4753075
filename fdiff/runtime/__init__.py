"""Where a process runs: its launcher and rank, its device, the signals that ask it to stop.

The only room that reads the environment. Open `launcher.py` first: one table of all launchers' variables.
"""

from __future__ import annotations

from fdiff.runtime import cpp_log, network
from fdiff.runtime.device import allow_tf32, choose_device, default_threads, set_up, visible_gpus
from fdiff.runtime.launcher import Launch, Rendezvous, cache_folder
from fdiff.runtime.memory import free_memory, killed_for_memory, peak_memory
from fdiff.runtime.paths import check_output, expand_path
from fdiff.runtime.signals import Stop, die_with_parent, heed_stop, heeding_signals
