"""Say what a run will communicate, without training or data: reporters by round, N, saving, wire bytes, time."""

from __future__ import annotations

import json as json_module

from fdiff.config import Config
from fdiff.errors import UserError
from fdiff.forecast import forecast, methods_table


def run(config: Config, *, json: bool = False, ranks: int | None = None, bandwidth: float | None = None) -> None:
    """Print the plan.

    Args:
        json: Print one JSON object instead of a table.
        ranks: Ranks among which the clients are spread; by default one for each client.
        bandwidth: Bandwidth of each rank's link in Mbit/s, to estimate the time of the collectives.
    """
    clients = config.federation.clients
    ranks = clients if ranks is None else ranks
    if not 1 <= ranks <= clients:
        raise UserError(f"--ranks: {ranks} is not valid; it must be between 1 and federation.clients = {clients}")
    if bandwidth is not None and not bandwidth > 0:
        raise UserError(f"--bandwidth: {bandwidth} is not valid; it must be greater than 0 Mbit/s")
    cost = forecast(config, ranks)
    if json:
        print(json_module.dumps(cost))
        return
    sizes = cost["parameters"]
    print(f"parameters  {'  '.join(f'{part} {n:,}' for part, n in sizes.items())}")
    for row in cost["rounds"]:
        reporters = "  ".join(f"{part} {','.join(map(str, r))}" for part, r in row["reporters"].items())
        print(f"round {row['round']:3}  {row['wire_bytes']:>13,} bytes  reporters: {reporters}")
    print(f"\n{config.method}: N = {cost['communicated_parameters']:,} parameters, {cost['saving']:.1%} less than full")
    print(f"\nall methods, {config.federation.rounds} rounds, {clients} clients on {ranks} ranks:")
    print(methods_table(config, ranks))
