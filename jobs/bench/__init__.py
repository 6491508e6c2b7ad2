"""What the pipeline costs, beside its peers and its own limit: `python -m jobs.bench`. It reports, it judges nothing."""
