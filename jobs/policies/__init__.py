"""Ways to choose ranks, compared on real pairs: `python -m jobs.policies`."""
