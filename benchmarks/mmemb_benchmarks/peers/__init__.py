"""The same inputs and weights through the ways in which others run them, each in an environment of its own."""

from mmemb_benchmarks.peers.run import BASELINE, PEERS, compare, peers_on

__all__ = ["BASELINE", "PEERS", "compare", "peers_on"]
