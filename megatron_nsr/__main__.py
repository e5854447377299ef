"""`python -m megatron_nsr` is the command `megatron-nsr`; torchrun starts ranks this way."""

from megatron_nsr.cli import main

if __name__ == "__main__":
    main()
