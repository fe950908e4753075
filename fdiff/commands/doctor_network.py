"""What a job will communicate over: the interfaces of its backend, and the variables that steer it."""

from __future__ import annotations

from fdiff.commands.doctor_checks import FAULT, GAP, OK, Finding
from fdiff.config import RuntimeConfig
from fdiff.errors import UserError
from fdiff.runtime import Launch, choose_device, network


def check_network(runtime: RuntimeConfig, launch: Launch) -> list[Finding]:
    """The interfaces that this rank's backend will use, those that there are, and the variables that are set."""
    found = network.interfaces()
    listed = ", ".join(f"{name} {address}" for name, address in found.items()) or "none with an IPv4 address"
    devices = "".join(f", {name}" for name in network.infiniband())
    variables = " ".join(f"{name}={value}" for name, value in network.steering_variables().items())
    return [
        _chosen(expected_backend(runtime, launch), found, launch.one_node),
        Finding("interfaces", OK, listed + (f"; InfiniBand{devices[1:]}" if devices else "")),
        Finding("variables", OK, variables or "none of NCCL_*, GLOO_*, UCX_*, OMPI_* and OMP_NUM_THREADS is set"),
    ]


def expected_backend(runtime: RuntimeConfig, launch: Launch) -> str:
    """none, mpi, nccl or gloo: what the job will communicate with, by what is known of this rank."""
    kind = runtime.comm
    if kind == "auto":
        kind = {"none": "none", "openmpi": "mpi", "mpich": "mpi"}.get(launch.launcher, "torch")
    if kind != "torch":
        return kind
    try:
        on_gpu = choose_device(runtime, launch).type == "cuda"
    except UserError:  # which is a problem of its own
        on_gpu = False
    return "nccl" if on_gpu and not runtime.share_gpu else "gloo"


def _chosen(backend: str, found: dict[str, str], one_node: bool) -> Finding:
    """The interfaces of a backend: a fault if a variable names none that is here."""
    if backend == "none":
        return Finding("network", OK, "one rank sends nothing")
    if backend == "mpi":
        how = "Open MPI: OMPI_MCA_btl_tcp_if_include, UCX: UCX_NET_DEVICES"
        return Finding("network", OK, f"mpi: the MPI library chooses ({how})")
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    if backend == "nccl":
        names, why = network.chosen_by_nccl(found, one_node)
    else:
        name, why = network.chosen_by_gloo(found, one_node, network.address_of_host())
        names = [name] if name else []
    if names:
        return Finding("network", OK, f"{backend}: {', '.join(names)} ({why})")
    others = [name for name in found if name != "lo"]
    right = f"export {variable}={others[0] if others else 'INTERFACE'}, one that the other nodes reach"
    if why.startswith(variable):
        return Finding("network", FAULT, f"{backend}: {why} names no interface of this host", right)
    return Finding("network", GAP, f"{backend}: {why}, which other nodes do not reach", right)
