"""Convert a Hugging Face checkpoint to Orbax: jaxmoe convert SRC DST --to orbax, with its options.

python -m scripts.convert_hf_to_orbax SRC DST [--mesh ...] [--weights-dtype ...] [--ram-gib N] [--verify] [--json]
"""

import sys

from jaxmoe.cli.main import run

if __name__ == "__main__":
    run(["convert", *sys.argv[1:], "--to", "orbax"])
