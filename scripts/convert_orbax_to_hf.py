"""A checkpoint that jaxmoe wrote for Orbax -> safetensors files: jaxmoe convert SRC DST --to hf, with its options.

python -m scripts.convert_orbax_to_hf SRC DST [--weights-dtype ...] [--ram-gib N] [--verify] [--json]
"""

import sys

from jaxmoe.cli.main import run

if __name__ == "__main__":
    run(["convert", *sys.argv[1:], "--to", "hf"])
