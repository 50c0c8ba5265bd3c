"""Makes a demo checkpoint: `python -m demo.train --model latte`, then the other models, which start from its parts.

Each model's stages are seeded: an autoencoder; the latents of all training videos, computed once; then the transformer
on those latents. Run the same command again to continue after an interruption. The checkpoint is replaced while
training goes on.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import fields

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from demo.model import Model
from demo.models import MODELS
from demo.training import HELP, Clock, Settings


def worker(rank: int, model: Model, settings: Settings) -> None:
    """One training process."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", f"file://{settings.work}/rendezvous", rank=rank, world_size=settings.processes)
    clock = Clock(time.time(), settings.stop_after_s)
    for stage in model.stages:
        if not stage(settings, clock):
            break
    dist.destroy_process_group()


def parse_arguments(arguments: list[str] | None = None) -> tuple[Model, Settings]:
    """The model and its settings from the command line; defaults are those of the model."""
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("--model", choices=MODELS, default="latte", help="which checkpoint to make")
    model = MODELS[choice.parse_known_args(arguments)[0].model]
    parser = argparse.ArgumentParser(
        prog="python -m demo.train",
        description="Makes a demo checkpoint; run it again to continue after an interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[choice],
    )
    for field in fields(Settings):
        default = getattr(model.settings, field.name)
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=type(default), default=default, help=HELP[field.name]
        )
    values = vars(parser.parse_args(arguments))
    del values["model"]
    return model, Settings(**values)


def main() -> None:
    """Runs all stages that are not complete yet."""
    model, settings = parse_arguments()
    settings.work.mkdir(parents=True, exist_ok=True)
    (settings.work / "rendezvous").unlink(missing_ok=True)
    spawn(worker, args=(model, settings), nprocs=settings.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
