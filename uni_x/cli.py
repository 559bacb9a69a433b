"""The command `uni-x`. Nothing heavy is imported until a verb is chosen."""

import errno
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from uni_x import launch
from uni_x.errors import DataError, ProcessError, UniXError, UsageError

app = typer.Typer(
    name="uni-x",
    help="Unified multimodal language models: one transformer that writes, looks and draws.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(help="Image tokenizers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: key=value or section.key=value.")]
Device = Annotated[str, typer.Option(help="cuda, mps, cpu, or auto for the best there is.")]

PLAIN_LINE_SECONDS = 30  # between two plain lines of progress; the first ones come sooner
_stopped = "Stopped."  # what is said after Ctrl-C
FIRST_SAY_SECONDS = 5  # a launcher ends all processes once one has ended, before the first one may have told why
STOPPED = 130  # exit code that typer gives a command that Ctrl-C ended


@app.command()
def quickstart(
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every stage, in a minute, with next to no training.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder. \\[default: runs/quickstart]")] = None,
) -> None:
    """Trains a small Uni-X on pictures of a small world, and shows it drawing, looking and answering."""
    from uni_x.workflows.quickstart import load_quickstart_recipe, quickstart

    folder = out or Path("runs/quickstart-smoke" if smoke else "runs/quickstart")
    with _progress() as progress:
        run, finished_before = quickstart(load_quickstart_recipe(smoke, overrides or []), folder, progress)
    if finished_before:
        typer.echo(f"This run is finished already. Delete {run.path} to start again.")
    scores = run.read_results()["scores"]
    typer.echo(
        f"drawing {scores['drawing']:.2f}  yes/no {scores['yes_no']:.2f}  "
        f"multiple choice {scores['multiple_choice']:.2f}"
    )
    typer.echo(f"Report: {run.report_file}")
    command = sys.argv[0] if shutil.which("uni-x") is None else "uni-x"
    typer.echo(f"Draw:   {shlex.join([command, 'generate', str(run.path / 'model'), 'a red heart left of a car'])}")


@app.command()
def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of captioned pictures, JSONL, Parquet, TSV or tar files, a data set's folder or hub id, "
            "scenes or openmoji."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the Parquet shards.")],
    image_tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder of an image tokenizer, or scenes. \\[default: scenes, for the scenes alone]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    max_aspect: Annotated[
        float, typer.Option(min=0, help="Reject pictures whose sides differ more than so many times; 0 takes any.")
    ] = 2.5,
    min_side: Annotated[
        int | None,
        typer.Option(
            min=0, help="Reject pictures with a side of fewer pixels. \\[default: a quarter of the resolution]"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures encoded at once. \\[default: as many as memory allows]")
    ] = None,
    kind: Annotated[
        Literal["tar", "parquet", "tsv", "jsonl", "json", "pictures", "dataset"] | None,
        typer.Option(help="Which files of a folder that holds several kinds."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Where else pictures may lie that rows name, beside their file's folder."
        ),
    ] = None,
    text_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the text tokenizer that made the input_ids of rows without a text.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set with several; train where it is left out.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download a hub data set first.")] = False,
    device: Device = "auto",
) -> None:
    """Turns pictures into image codes, once, on disk; several processes (accelerate launch) share the work."""
    from uni_x.data.prepare import Filters
    from uni_x.data.readers import SourceOptions
    from uni_x.devices import choose_own_device
    from uni_x.images import load_image_tokenizer
    from uni_x.workflows.quickstart import load_quickstart_recipe
    from uni_x.workflows.sources import OPENMOJI, SCENES, describe_encoded, describe_share, encode_scenes, encode_source

    if image_tokenizer is None and source != SCENES:
        raise UsageError(
            f"--image-tokenizer is missing: which one encodes {source}? `uni-x tokenizer train` makes one from pictures"
        )
    options = SourceOptions(split, streaming, kind, pictures)
    if source in (SCENES, OPENMOJI) and (text_tokenizer is not None or options != SourceOptions()):
        raise UsageError(
            f"--kind, --pictures, --split, --streaming and --text-tokenizer mean nothing to {source}; leave them out"
        )
    tokenizer = load_image_tokenizer(image_tokenizer or SCENES).to(choose_own_device(device))
    filters = Filters(max_aspect, tokenizer.resolution // 4 if min_side is None else min_side)
    with _progress() as progress:
        report = partial(progress, "encode")
        if source == SCENES:
            recipe = load_quickstart_recipe()
            summary = encode_scenes(recipe.scenes.at_most(limit), recipe.seed, out, tokenizer, report)
        else:
            summary = encode_source(
                source,
                tokenizer,
                out,
                limit,
                report,
                filters=filters,
                batch_size=batch_size,
                options=options,
                text_tokenizer=text_tokenizer,
            )
    if not summary.finished or (summary.already_done and launch.rank() > 0):
        typer.echo(describe_share(out, summary))  # another process finds the folder whole, and tells of it
        return
    if summary.already_done:
        typer.echo(f"This folder is finished already. Delete {out} to encode again.")
    typer.echo(describe_encoded(source, out, summary))


@data_app.command("check")
def data_check(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `uni-x encode` wrote, or others of such shards.")],
    image_tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the image tokenizer whose codes these shall be, or scenes.")
    ] = None,
    benchmark: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of prompts or questions (.txt, .json, .jsonl, .tsv, .parquet), or folder of .txt files, that "
            "must not be in the data."
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="At most so many rows are named of each kind of finding.")] = 5,
) -> None:
    """Goes through every sample and lists what is wrong; exit code 1 for errors, 0 for remarks alone."""
    from uni_x.workflows.data import check_folders

    ok = True
    for checked in check_folders(folders, image_tokenizer, benchmark or [], examples):
        for line in checked.lines:
            typer.echo(line)
        ok = ok and checked.ok
    if not ok:
        raise typer.Exit(1)


@data_app.command("stats")
def data_stats(
    path: Annotated[Path, typer.Argument(help="A training recipe, or a folder of shards with --model.")],
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="For a folder: the model folder whose tokenizer and rendering count.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a row. \\[default: the recipe's, or the most the model takes]")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="SVG or PNG file to draw the lengths into.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples of each source.")] = None,
) -> None:
    """Counts samples and tokens, and forecasts how they fill rows in training."""
    from uni_x.workflows.data import describe_data

    for line in describe_data(path, model, max_length, picture, limit, overrides or []):
        typer.echo(line)


@data_app.command("translate")
def data_translate(
    source: Annotated[Path, typer.Argument(help="A .jsonl, .parquet or .tsv file, or a .txt with one prompt a line.")],
    out: Annotated[Path, typer.Option(help="File to write, of the same kind.")],
    to: Annotated[str, typer.Option(help="Language to translate into.")],
    model: Annotated[str, typer.Option(help="Name of the model, as the server knows it.")],
    column: Annotated[list[str] | None, typer.Option(help="Column to translate; may be given again.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Language of the source. \\[default: told by the model]")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible address. \\[default: $OPENAI_BASE_URL, or OpenAI]")
    ] = None,
    key_variable: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="At most so many requests a minute.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a text is asked for again.")] = 6,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 300,
    max_characters: Annotated[int, typer.Option(min=1, help="A row with a longer text is not sent, and fails.")] = 8000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Counts what is left to be sent, and sends nothing.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="With --dry-run: folder of a tokenizer to count with.")] = None,
) -> None:
    """Translates text columns of a file through an OpenAI-compatible endpoint, and goes on where it stopped.

    Exit code 1 where rows failed or are broken; the file is whole all the same.
    """
    from uni_x.data.translation.translate import TranslateOptions
    from uni_x.workflows.translation import plan_translation, translate_file

    options = TranslateOptions(
        model=model,
        to=to,
        columns=tuple(column or ()),
        source_language=from_,
        base_url=base_url,
        key_variable=key_variable,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        retries=retries,
        timeout=timeout,
        max_characters=max_characters,
    )
    if tokenizer is not None and not dry_run:
        raise UsageError("--tokenizer counts for --dry-run alone; leave it out, or add --dry-run")
    if dry_run:
        for line in plan_translation(source, out, options, tokenizer):
            typer.echo(line)
        return
    with _progress() as progress:
        translated = translate_file(source, out, options, partial(progress, "translate"))
    for line in translated.lines:
        typer.echo(line)
    if not translated.ok:
        raise typer.Exit(1)


@tokenizer_app.command("train")
def tokenizer_train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer and its figures.")] = Path("runs/tokenizer"),
    device: Device = "auto",
) -> None:
    """Trains an image tokenizer on a folder of pictures, or on the scenes."""
    from uni_x.recipe import TokenizerRecipe, load_recipe
    from uni_x.workflows.tokenizer import train_tokenizer_from

    checked = load_recipe(recipe, TokenizerRecipe, overrides)
    with _progress() as progress:
        result = train_tokenizer_from(checked, out, partial(progress, "tokenizer"), typer.echo, device)
    if result.already_done:
        typer.echo("This run is finished already; give another folder (--out) to train again.")
    quality = result.results["quality"]
    typer.echo(f"PSNR {quality['psnr_db']} dB  SSIM {quality['ssim']}  codes used {quality['codebook']['used']}")
    typer.echo(f"Originals above reconstructions: {result.folder / 'reconstructions.png'}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    overrides: Overrides = None,
) -> None:
    """Trains a model on encoded data, and goes on where an earlier call stopped."""
    from uni_x.recipe import TrainRecipe, load_recipe

    checked = load_recipe(recipe, TrainRecipe, overrides)
    from uni_x.train.run import train
    from uni_x.workflows.quickstart import losses_in_words

    with _progress() as progress:
        trained = train(checked, lambda done, total, losses: progress("train", done, total, losses_in_words(losses)))
    if launch.rank() > 0:
        return
    if trained.already_done:
        typer.echo("This run is finished already; give another run folder (run=…) to train again.")
    if trained.metrics:
        typer.echo(f"Step {trained.metrics[-1]['step']:.0f}: {losses_in_words(trained.metrics[-1])}")
    typer.echo(f"Model: {trained.model_dir}")


@app.command()
def init(
    base: Annotated[str, typer.Argument(help="A pretrained LLM: a folder, a GGUF file, or its id on the hub.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    image_tokenizer: Annotated[str, typer.Option(help="Folder of an image tokenizer, or scenes.")],
    plan: Annotated[str, typer.Option(help="A preset, as 'uni-x(12, 6)', or a YAML file with a plan.")] = "shared",
    new_rows: Annotated[
        Literal["mean", "codebook"],
        typer.Option(help="Embeddings of the codes: the mean of all words, or spread around it as the codebook is."),
    ] = "mean",
    init_vision_with_text: Annotated[
        bool, typer.Option("--init-vision-with-text", help="Start image layers as copies of text layers.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="\\[default: that of the LLM]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    separator: Annotated[
        str | None,
        typer.Option(help="Token to stand between image codes (data.render.vis_sep); added where the LLM has none."),
    ] = None,
) -> None:
    """Makes a model that also sees and draws out of a pretrained Qwen2, Qwen2.5, Qwen3 or Llama."""
    from uni_x.workflows.convert import init

    parameters = init(base, image_tokenizer, plan, out, new_rows, init_vision_with_text, dtype, seed, separator)
    typer.echo(f"Model: {out} ({parameters:,} parameters)")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder to read.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    read_from: Annotated[
        Literal["reference"] | None, typer.Option("--from", help="The source has the layout of the published code.")
    ] = None,
    write_to: Annotated[
        Literal["base"] | None, typer.Option("--to", help="Write the plain LLM that text passes.")
    ] = None,
    image_tokenizer: Annotated[
        str | None, typer.Option(help="Image tokenizer to complete a published checkpoint with.")
    ] = None,
    text_tokenizer: Annotated[
        Path | None, typer.Option(help="Text tokenizer to complete a published checkpoint with.")
    ] = None,
    image_token_offset: Annotated[
        int | None, typer.Option(min=0, help="Id of image code 0, where a published checkpoint does not say it.")
    ] = None,
) -> None:
    """Reads published checkpoints, or writes a model's text path as a plain Qwen2, Qwen3 or Llama."""
    from uni_x.workflows.convert import convert

    convert(source, destination, read_from, write_to, typer.echo, image_tokenizer, text_tokenizer, image_token_offset)
    typer.echo(f"Model: {destination}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw; a question or text with --image or --text.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to ask about, or to describe without a prompt.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Go on with the prompt as text.")] = False,
    out: Annotated[Path, typer.Option(help="File for the drawing; number n gets -n.")] = Path("drawing.png"),
    number: Annotated[int, typer.Option(min=1, max=64, help="How many drawings.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 65, help="Of the first drawing.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="\\[default: the model's for pictures, 0 for text]")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="\\[default: the model's]")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="For text.")] = 64,
    device: Device = "auto",
) -> None:
    """Draws a prompt, answers a question about a picture, describes it, or goes on with a text."""
    from uni_x.workflows.generate import answer, continue_text, describe, draw

    if image is not None and prompt is None:
        typer.echo(describe(model, image, max_new_tokens, device))
    elif prompt is None:
        raise UsageError("what shall be drawn? Give a prompt, or a picture to describe (--image)")
    elif image is not None:
        typer.echo(answer(model, prompt, image, max_new_tokens, temperature, seed, device))
    elif text:
        typer.echo(continue_text(model, prompt, max_new_tokens, temperature, seed, device))
    else:
        for file in draw(model, prompt, out, number, seed, temperature, guidance_scale, device):
            typer.echo(str(file))


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A model folder, or a training recipe.")],
    memory: Annotated[bool, typer.Option("--memory", help="Show what training and serving take.")] = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a document, and of a served sequence.")] = 2048,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a training step on one device.")] = 16384,
    rows: Annotated[int, typer.Option(min=1, help="Sequences served at the same time.")] = 16,
    devices: Annotated[int, typer.Option(min=1, help="Devices that training is divided over.")] = 8,
    image_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the tokens that are image tokens.")] = 0.75,
    picture: Annotated[Path | None, typer.Option(help="SVG file to draw the plan into.")] = None,
) -> None:
    """Shows a model's plan, layer by layer, its parameters and operations, and the memory that it takes."""
    from uni_x.workflows.info import Load, describe

    for line in describe(path, memory, Load(length, tokens, rows, devices, image_share), picture):
        typer.echo(line)


@app.command()
def env() -> None:
    """Prints versions, devices and dtypes, for a bug report."""
    from uni_x.workflows.info import environment

    for name, value in environment().items():
        typer.echo(f"{name}: {value}")


def main() -> None:
    """Runs the command; a user's mistake is one line and exit code 1 (2 for wrong usage), never a traceback."""
    _settle_libraries()
    try:
        rank = launch.rank()
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    shown = _Warnings(logging.WARNING) if rank == 0 else logging.NullHandler()
    logging.getLogger("uni_x").addHandler(shown)
    try:
        _run_app()
    except UniXError as error:
        if rank == 0:
            typer.echo(f"error: {error}", err=True)
        elif isinstance(error, ProcessError) or launch.is_first_of_machine():
            typer.echo(f"error in process {rank}: {error}", err=True)
        else:
            time.sleep(FIRST_SAY_SECONDS)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit as exit_:
        if exit_.code in (None, 0, STOPPED):  # in all processes alike
            launch.leave()
        if exit_.code == STOPPED and rank == 0:
            typer.echo(_stopped, err=True)
        raise


def _run_app() -> None:
    try:
        app(standalone_mode=True)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise DataError(f"{error.filename}: no file or folder can have a name that long") from None


class _Warnings(logging.Handler):
    """Shows the warnings of the package, above the progress line where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line; errors reach the user by themselves."""
        if record.levelno == logging.WARNING:
            typer.echo(f"warning: {record.getMessage()}", err=True)


def _settle_libraries() -> None:
    """What libraries read once, when they are loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # of names that DeepSpeed uses
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of names that PEFT uses
    # of bfloat16 beside weights in float32, which is what autocast makes
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # the recipe says how many, for whichever machine
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    # such a picture is refused, with the reason
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/accel")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, warns that it found none
    # threads of an operator that is done wait a moment and then sleep: spinning, which is the default, makes two
    # threads five times slower than one as soon as anything else runs on the machine
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """A progress line a stage, with rate and time left; where there is no terminal, a plain line now and then.

    Of processes that were started together the first one shows it. A `KeyboardInterrupt` may say where it has left off.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    global _stopped
    go_on = "Run the same command again to go on."
    _stopped = f"Stopped. {go_on}"
    console = Console(stderr=True, quiet=launch.rank() > 0)
    bars = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
        console=console,
    )
    tasks: dict[str, Any] = {}
    said, pause = -math.inf, 1  # when the last plain line was printed, and the seconds until the next
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def report(stage: str, done: int, total: int, word: str = "") -> None:
        if interrupted:
            raise KeyboardInterrupt  # the first one did not come through: something on the way caught it
        nonlocal said, pause
        new = stage not in tasks
        if new:
            tasks[stage] = bars.add_task(stage, total=total or None, word=word, rate="")
        task = bars.tasks[list(tasks).index(stage)]
        is_end = done == total > task.completed
        speed = f"{task.speed:.1f}/s" if task.speed else ""
        bars.update(tasks[stage], completed=done, total=total or None, word=word, rate=speed)
        if not console.is_terminal and (new or is_end or time.monotonic() - said >= pause):
            said, pause = time.monotonic(), min(2 * pause, PLAIN_LINE_SECONDS)
            count = f"{done} of {total}" if total else "…"
            console.print(f"{stage} {count}  {speed}  {word}".rstrip(), highlight=False)

    if not console.is_terminal:
        bars.disable = True
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with bars:
            yield report
    except KeyboardInterrupt as interruption:
        if place := str(interruption):
            _stopped = f"Stopped {place}. {go_on}"
        raise
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
