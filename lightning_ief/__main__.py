"""`python -m lightning_ief` is `lightning-ief`, wherever that is installed."""

from lightning_ief.experiments.cli import main

if __name__ == "__main__":
    main()
