"""`python -m msq` and `torchrun -m msq` are the same as `msq`."""

from msq.cli import main

if __name__ == "__main__":
    main()
