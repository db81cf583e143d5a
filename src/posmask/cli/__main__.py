"""`python -m posmask.cli`, for torchrun."""

from posmask.cli import main

if __name__ == "__main__":
    main()
