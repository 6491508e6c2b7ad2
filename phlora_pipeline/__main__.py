"""`python -m phlora_pipeline` is the `phlora` command."""

from phlora_pipeline.cli import command

if __name__ == "__main__":
    command()
