"""What every test has: the Slurm cluster, for those that ask for one."""

from slurm_cluster import slurm_cluster  # noqa: F401
