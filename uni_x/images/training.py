"""Trains an image tokenizer on pictures that the caller brings, and measures it on pictures held out.

A run's folder holds `recipe.yaml`, `log.txt`, `checkpoint.pt` while it trains, and in the end `tokenizer/`,
`results.json` and `reconstructions.png`. A stopped run goes on from its checkpoint and ends with the same weights as
one that was not stopped, since every random draw of a step comes from the recipe's seed and the number of the step
alone.
"""

import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from uni_x.errors import DataError, RunError
from uni_x.images.codebook import CodebookLearner
from uni_x.images.pixels import Picture, comparison, preprocess
from uni_x.images.quality import codebook_use, peak_signal_to_noise, structural_similarity
from uni_x.images.tokenizer import ImageTokenizer
from uni_x.recipe import TokenizerRecipe, TokenizerTraining
from uni_x.runs import RunFolder, writing_into
from uni_x.stopping import StopSignals

CHECKPOINT_FILE = "checkpoint.pt"
TOKENIZER_FOLDER = "tokenizer"
FIRST_CODEBOOK_BATCHES = 8
WARM_UP_STEPS = 20
RESTARTS_END = 0.8  # share of the steps after which no code moves any more
SHOWN = 16
LOGS_BYTES = 2**20
LOGGED = 20  # steps of a run that are told in its log

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, dict[str, float]], None]
"""Called after each step with the steps done, the steps in all, and figures: `loss`, and `codes` used in the batch."""


@dataclass(frozen=True)
class TokenizerResult:
    """A finished run: its folder, its tokenizer, what `results.json` holds, and whether it was finished before."""

    folder: Path
    tokenizer: ImageTokenizer
    results: dict[str, Any]
    already_done: bool


def train_tokenizer(
    recipe: TokenizerRecipe,
    pictures: Iterable[Picture],
    out_dir: str | Path,
    held_out: Sequence[Picture] | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    remarks: Sequence[str] = (),
) -> TokenizerResult:
    """Trains the tokenizer of `recipe` in `out_dir`, or goes on where a stopped run left off.

    `pictures` is best a sequence that makes or opens a picture when asked for it; any other iterable is read into
    memory. Without `held_out`, `recipe.eval_pictures` of them are set aside to be measured. `remarks` on them go into
    the log. Ctrl-C and SIGTERM end it with `KeyboardInterrupt` after the step, once a checkpoint is written; what ends
    it otherwise costs the steps since the last one. Raises `RunError` where `out_dir` was made by another recipe or
    holds other things, `DataError` for too few pictures or one that cannot be read.
    """
    folder = RunFolder(out_dir, recipe.model_dump(mode="json"))
    checkpoint, tokenizer_folder = folder.path / CHECKPOINT_FILE, folder.path / TOKENIZER_FOLDER
    if results := folder.read_results():
        tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder).to(device)
        return TokenizerResult(folder.path, tokenizer, results, already_done=True)

    samples: Sequence[Picture] = pictures if isinstance(pictures, Sequence) else list(pictures)
    indices, held_out = _hold_out(recipe, samples, held_out)
    with torch.random.fork_rng():
        run = TrainingRun(recipe, device)
        # weights and two moments, twice while a checkpoint replaces another
        folder.begin()
        folder.require(6 * sum(weight.nbytes for weight in run.network.parameters()) + LOGS_BYTES)
        for remark in remarks:
            logger.info(remark)
        run.resume(checkpoint)
        logger.info("%d pictures to train on, %d to measure; %d steps are done", len(indices), len(held_out), run.step)
        with StopSignals() as signals:
            _train(run, samples, indices, checkpoint, signals, progress)
    with writing_into(folder.path):
        run.tokenizer.save_pretrained(tokenizer_folder, getattr(torch, recipe.stored_as))
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder).to(device)
    results = {
        "quality": measure_quality(tokenizer, held_out),
        "training": {"pictures": len(indices), "steps": recipe.training.steps, "seconds": round(run.seconds, 1)},
        "seed": recipe.seed,
    }
    quality = results["quality"]
    logger.info("PSNR %s dB, SSIM %s, codes used %d", quality["psnr_db"], quality["ssim"], quality["codebook"]["used"])
    shown = tokenizer.preprocess(held_out[:SHOWN])
    sheet = comparison(shown, tokenizer.decode_pixels(tokenizer.encode_pixels(shown)))
    with writing_into(folder.path):
        sheet.save(folder.path / "reconstructions.png")
    folder.write_results(results)
    checkpoint.unlink(missing_ok=True)
    return TokenizerResult(folder.path, tokenizer, folder.read_results(), already_done=False)


def measure_quality(tokenizer: ImageTokenizer, pictures: Sequence[Picture], batch_size: int = 64) -> dict[str, Any]:
    """Likeness of reconstructions in bytes, and codebook use: means over `pictures`.

    `psnr_db` and `ssim` are means of each picture's figure; `psnr_db_lowest` is the worst picture's.
    """
    psnr, ssim, codes = [], [], []
    for start in range(0, len(pictures), batch_size):
        pixels = tokenizer.preprocess(pictures[start : start + batch_size])
        codes.append(tokenizer.encode_pixels(pixels))
        decoded = tokenizer.preprocess(tokenizer.decode(codes[-1]))  # through bytes, as a person sees it
        pixels, decoded = (pixels + 1) / 2, (decoded + 1) / 2
        psnr.append(peak_signal_to_noise(pixels, decoded))
        ssim.append(structural_similarity(pixels, decoded))
    psnr_db = torch.cat(psnr)
    return {
        "pictures": len(pictures),
        "psnr_db": round(float(psnr_db.mean()), 2),
        "psnr_db_lowest": round(float(psnr_db.min()), 2),
        "ssim": round(float(torch.cat(ssim).mean()), 4),
        "codebook": codebook_use(torch.cat(codes), tokenizer.codebook_size),
    }


class TrainingRun:
    """Everything that changes from step to step: weights, optimizer, codebook averages, the number of the step."""

    def __init__(self, recipe: TokenizerRecipe, device: torch.device | str):
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.tokenizer = ImageTokenizer(recipe.tokenizer).to(device)
        self.network = self.tokenizer.network
        self.codebook = self.network.quantize.embedding.weight.requires_grad_(False)
        self.learner = CodebookLearner(self.codebook, recipe.training.codebook_decay)
        self.parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=recipe.training.learning_rate, betas=(0.9, 0.99))
        self.step = 0
        self.seconds = 0.0

    def train_step(self, pixels: torch.Tensor) -> dict[str, float]:
        """One batch `(n, 3, resolution, resolution)`; returns `loss` and, once there are codes, `codes` in use."""
        training = self.recipe.training
        self.optimizer.param_groups[0]["lr"] = learning_rate(training, self.step)
        figures = {}
        latents = self.network.encode(pixels)
        quantised, commitment = latents, latents.new_zeros(())
        if self.step >= training.continuous_steps:
            codes = self.network.quantize.codes(latents)
            nearest = self.network.quantize.latents(codes)
            commitment = F.mse_loss(latents, nearest)
            quantised = latents + (nearest - latents).detach()  # the decoder's gradient passes straight through
            figures["codes"] = float(len(codes.unique()))
        reconstruction = self.network.decode(quantised)
        error = F.mse_loss(reconstruction, pixels) if training.loss == "mse" else F.l1_loss(reconstruction, pixels)
        self.optimizer.zero_grad(set_to_none=True)
        (error + training.commitment_weight * commitment).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.step >= training.continuous_steps:
            self._learn_codebook(latents.detach(), codes)
        self.step += 1
        return {"loss": float(error.detach()), **figures}

    def start_codebook(self, batches: Iterable[torch.Tensor]) -> None:
        """Sets the first codebook from the latents of some batches of pixels."""
        with torch.no_grad():
            vectors = torch.cat([_vectors(self.network.encode(pixels)) for pixels in batches])
        self.learner.start(self.codebook, vectors)

    def save(self, path: Path) -> None:
        """Writes all of it to `path`, whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = path.with_name(f"{path.name}.partial")
        with writing_into(path.parent):
            torch.save(state, partial)
            os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Takes up what `save` wrote, where there is something."""
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.codebook.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError):
            raise RunError(f"{path}: not a readable checkpoint; delete it to start this run again") from None

    @torch.no_grad()
    def _learn_codebook(self, latents: torch.Tensor, codes: torch.Tensor) -> None:
        training = self.recipe.training
        vectors, codes = _vectors(latents), codes.flatten()
        if (self.step + 1) % training.restart_every == 0 and self.step < RESTARTS_END * training.steps:
            self.learner.restart(self.codebook, vectors, codes)
        self.learner.update(self.codebook, vectors, codes)


def learning_rate(training: TokenizerTraining, step: int) -> float:
    """The rate at `step`: a short linear rise, then half a cosine down to nothing."""
    rise = min(1.0, (step + 1) / WARM_UP_STEPS)
    return training.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / training.steps))


def _train(
    run: TrainingRun,
    samples: Sequence[Picture],
    indices: Sequence[int],
    checkpoint: Path,
    signals: StopSignals,
    progress: Progress | None,
) -> None:
    recipe = run.recipe
    run.network.train()
    while run.step < recipe.training.steps:
        started = time.perf_counter()
        torch.manual_seed(recipe.seed * 1_000_003 + run.step + 1)
        if run.step == recipe.training.continuous_steps:
            run.start_codebook([_draw_batch(run, samples, indices) for _ in range(FIRST_CODEBOOK_BATCHES)])
        figures = run.train_step(_draw_batch(run, samples, indices))
        run.seconds += time.perf_counter() - started
        is_last = run.step == recipe.training.steps or signals.requested
        if is_last or run.step % recipe.training.checkpoint_every == 0:
            run.save(checkpoint)
        if is_last or run.step % max(1, recipe.training.steps // LOGGED) == 0:
            logger.info("step %d of %d: loss %.4f", run.step, recipe.training.steps, figures["loss"])
        if progress is not None:
            progress(run.step, recipe.training.steps, figures)
        if is_last:
            break
    if signals.requested:
        place = f"after step {run.step} of {recipe.training.steps}, which {checkpoint} holds"
        logger.info("stopped %s", place)
        raise KeyboardInterrupt(place)
    run.network.eval()


def _draw_batch(run: TrainingRun, samples: Sequence[Picture], indices: Sequence[int]) -> torch.Tensor:
    draws = torch.randint(len(indices), (run.recipe.training.batch_size,))
    batch = [samples[indices[draw]] for draw in draws.tolist()]
    return preprocess(batch, run.recipe.tokenizer.resolution).to(run.codebook.device)


def _vectors(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def _hold_out(
    recipe: TokenizerRecipe, samples: Sequence[Picture], held_out: Sequence[Picture] | None
) -> tuple[Sequence[int], Sequence[Picture]]:
    """Indices of the pictures to train on, and the pictures to measure."""
    if held_out is not None:
        if not samples or not held_out:
            raise DataError("there are no pictures to train on, or none to measure")
        return range(len(samples)), held_out
    count = recipe.eval_pictures
    if len(samples) <= count:
        raise DataError(
            f"{recipe.source}: {len(samples)} pictures, of which eval_pictures would hold out {count}; "
            "none is left to train on"
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return sorted(order[count:]), [samples[index] for index in sorted(order[:count])]
