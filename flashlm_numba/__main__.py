"""`python -m flashlm_numba` runs the command `flashlm-numba`."""

from flashlm_numba.cli.main import main

if __name__ == "__main__":
    main(prog_name="flashlm-numba")
