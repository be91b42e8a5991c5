"""Curation on a Ray cluster of two workers on this machine: `python curate_ray.py SOURCE OUT [key=value]`."""

import sys

import ray
from ray.cluster_utils import Cluster

from xray import cli

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}, shutdown_at_exit=False
    )
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    status = cli.main(["curate", *sys.argv[1:], "engine=ray"])
    ray.shutdown()
    cluster.shutdown()
    sys.exit(status)
