"""A federation at work: the paper's algorithm, and all that its steps are made of.

Open `rounds.py` first: the round loop. Then `client.py` (local training), `aggregate.py` (the weighted mean of the
shared parts) and `host.py` (several clients on one rank). Every collective call of a training starts in this room.
"""

from __future__ import annotations

from fdiff.federation.assemble import check_ranks
from fdiff.federation.client import Client, Report, Trainer
from fdiff.federation.duration import duration
from fdiff.federation.events import score_tag, write_scores
from fdiff.federation.export import choose_model, load_model, model_name, model_of, save_model
from fdiff.federation.export_diffusers import save_pipeline
from fdiff.federation.federator import Federator, check_folder
from fdiff.federation.forecast import (
    bytes_by_purpose,
    communicated,
    forecast_run,
    idle_note,
    itemsize,
    methods_table,
    payload_of,
    placement_for,
    plan_of,
    plans,
    seconds,
)
from fdiff.federation.logs import append_jsonl, read_regular, write_atomically
from fdiff.federation.memory import GIB, Memory, memory_of_rank
from fdiff.federation.rehearsal import rehearse
from fdiff.federation.rounds import Federation, run
from fdiff.federation.run_files import find_gaps, images_of, log_problem, read_config, read_log, read_setting
from fdiff.federation.same_code import checksum_of, find_differences
from fdiff.federation.saved import Saved, open_checkpoint, open_together
from fdiff.federation.snapshot import MAY_CHANGE, newest_sound
from fdiff.federation.training_images import count_images, infer_image_shape, open_data
from fdiff.federation.validate import find_problems, private_parts
from fdiff.federation.voting import on_rank_0, together
