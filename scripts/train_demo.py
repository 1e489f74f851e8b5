"""Train the small model of checkpoints/demo on the sources of Python's standard library, and write its manifest.

python -m scripts.train_demo --out checkpoints/demo
python -m scripts.train_demo --out /tmp/again --reproduces checkpoints/demo
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from jaxmoe.errors import JaxmoeError
from jaxmoe.parallel.mesh import build_mesh, emulate_devices, parse_mesh
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.train.loop import train
from jaxmoe.train.recipe import TrainingRecipe
from jaxmoe.train.step import Trainer
from scripts.demo_corpus import num_bytes, read_corpus
from scripts.demo_export import replace_directory, write_checkpoint, write_json
from scripts.demo_manifest import MANIFEST, REPRODUCED_WITHIN, manifest_of, record_reproduction
from scripts.demo_recipe import DEMO_RECIPE
from scripts.demo_tokenizer import token_stream, train_tokenizer

DEFAULT = DEMO_RECIPE
SAMPLES = (
    ("def read_lines(path, encoding=None):\n", 0.0),
    ("def read_lines(path, encoding=None):\n", 0.7),
    ("class Queue:\n", 0.7),
    ("import os\n", 0.7),
)


def sample(directory: Path, placement: MeshPlacement) -> list[dict[str, Any]]:
    """Return greedy and random samples that the checkpoint in directory generates."""
    from jaxmoe import LLM, SamplingParams

    llm = LLM.load(directory, mesh=placement.mesh, dtype="float32")
    params = [SamplingParams(max_tokens=200, temperature=heat, seed=seed) for seed, (_, heat) in enumerate(SAMPLES)]
    outputs = llm.generate([prompt for prompt, _ in SAMPLES], params)
    return [
        {"prompt": prompt, "temperature": chosen.temperature, "seed": chosen.seed, "text": output.text}
        for (prompt, _), chosen, output in zip(SAMPLES, params, outputs, strict=True)
    ]


def run(out: Path, mesh: str, recipe: TrainingRecipe, reproduces: Path | None) -> None:
    """Run everything: corpus, tokenizer, training, checkpoint, samples, manifest, and the rename at the end."""
    console = Console(stderr=True)
    placement = MeshPlacement(mesh=build_mesh(parse_mesh(mesh)))
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.training, vocab_size=recipe.model.vocab_size)
    training, held_out = token_stream(tokenizer, corpus.training), token_stream(tokenizer, corpus.held_out)
    console.print(f"{len(corpus.training)} files, {len(training)} tokens; held out {len(held_out)} tokens")
    trainer = Trainer(recipe, placement)
    result = train(trainer, training, held_out, held_out_bytes=num_bytes(corpus.held_out), console=console)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        directory = Path(scratch) / out.name
        directory.mkdir()
        write_checkpoint(
            directory, trainer.named(result.state.params), recipe.model, placement, trainer.segments, tokenizer
        )
        samples = sample(directory, placement)
        manifest = manifest_of(
            directory, recipe=recipe, corpus=corpus.describe(), placement=placement, result=result,
            num_parameters=sum(math.prod(info.shape) for info in trainer.table), samples=samples,
        )  # fmt: skip
        write_json(directory / MANIFEST, manifest)
        replace_directory(directory, out)
    for each in samples:
        console.rule(f"temperature {each['temperature']}")
        console.print(each["prompt"] + each["text"], markup=False, highlight=False, soft_wrap=True)
    console.rule()
    console.print(f"wrote {out}")
    if reproduces is not None:
        distance = record_reproduction(reproduces, result, placement)
        console.print(f"held-out loss per byte differs by {distance:+.2%} from that of {reproduces}")
        if distance > REPRODUCED_WITHIN:
            raise click.ClickException(
                f"the recipe missed the stated loss by {distance:.2%}, above {REPRODUCED_WITHIN:.0%}"
            )


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="checkpoint to write")
@click.option("--mesh", default="data=1", show_default=True, help="mesh axes, as in data=2,tensor=2")
@click.option(
    "--devices", type=int, default=1, show_default=True, help="emulate this many CPU devices; 0: use the real ones"
)
@click.option("--steps", type=int, default=DEFAULT.num_steps, show_default=True)
@click.option("--seed", type=int, default=DEFAULT.seed, show_default=True)
@click.option(
    "--reproduces", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="a checkpoint of the same recipe: compare the loss with its loss, and record the result in its manifest",
)  # fmt: skip
def main(out: Path, mesh: str, devices: int, steps: int, seed: int, reproduces: Path | None) -> None:
    """Read the command line; print a user's error on one line."""
    try:
        if devices:
            emulate_devices(devices)
        warmup = min(DEFAULT.warmup_steps, max(1, steps // 10))
        recipe = replace(DEMO_RECIPE, num_steps=steps, warmup_steps=warmup, seed=seed)
        run(out.resolve(), mesh, recipe, reproduces)
    except JaxmoeError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
