"""`python -m phlora_pipeline` is the `phlora` command."""

from phlora_pipeline.cli import main

if __name__ == "__main__":
    main()
