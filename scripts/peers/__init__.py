"""The programs that bench_peers.py compares, each a process of its own."""
