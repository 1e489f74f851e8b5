"""Convert an Orbax checkpoint of jaxmoe to safetensors files: jaxmoe convert SRC DST --to hf, with its options.

python -m scripts.convert_orbax_to_hf SRC DST [--weights-dtype ...] [--ram-gib N] [--verify] [--json]
"""

import sys

from jaxmoe.cli.main import run

if __name__ == "__main__":
    run(["convert", *sys.argv[1:], "--to", "hf"])
