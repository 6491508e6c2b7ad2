"""The demo zoo: real checkpoints out of package registries, extracted, verified and scored by `python -m jobs.demo`."""
