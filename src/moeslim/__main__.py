"""`python -m moeslim` is the command line, as torchrun starts it: `torchrun --nproc-per-node 2 -m moeslim ...`."""

from moeslim.cli.main import main

if __name__ == "__main__":
    main()
