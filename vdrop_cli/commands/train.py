"""`vdrop train`: trains a model into its run folder. The loop yields records; who listens is none of its business."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import OmegaConf

from vdrop_cli import checkpoint, corpora, environment, evaluate
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.config import Backend, ConfigError, Train, plain
from vdrop_cli.dropout import Stream
from vdrop_cli.environment import COMPUTE_DTYPES
from vdrop_cli.kernels import choose
from vdrop_cli.model import LanguageModel
from vdrop_cli.schedule import Optimiser, learning_rate
from vdrop_cli.sinks import Epoch, Failure, JsonLines, Progress, Record, Result, Sink, Start, Step, TensorBoard, ppl, read_result
from vdrop_cli.tasks import LanguageModelling


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number."""


class Run:
    """One training run, from its start or from its newest good checkpoint."""

    def __init__(self, settings: Train, task: LanguageModelling, folder: Path) -> None:
        self.settings, self.task, self.folder = settings, task, folder
        self.model = LanguageModel(
            settings.model, settings.dropout, len(task.corpus.vocabulary), settings.backend.name, COMPUTE_DTYPES[settings.precision]
        )
        self.model.initialise(settings.model.init, Stream((settings.seed, "init")))
        self.epoch, self.seconds = 0, 0.0
        self.best_epoch, self.best_ppl = 0, math.inf
        found = checkpoint.newest(folder)
        if found is not None:
            theirs = (found.train.identity(found.corpus), found.train.seed)
            if theirs != (settings.identity(task.corpus.fingerprint), settings.seed):
                raise ConfigError(f"{folder} holds a checkpoint of other settings; start over with force=true")
            self.model.load_state_dict(found.model)
            self.epoch, self.seconds, self.best_epoch, self.best_ppl = found.epoch, found.seconds, found.best_epoch, found.best_ppl
        self.model.to(task.device)
        self.optimiser = Optimiser(self.model, settings.schedule)

    @property
    def step(self) -> int:
        """Updates made until the last finished epoch."""
        return self.epoch * self.task.chunks_an_epoch

    @property
    def goes_on(self) -> bool:
        """Whether there is an epoch left to train, and patience for it."""
        patience = self.settings.schedule.patience
        patient = patience is None or self.epoch - self.best_epoch < patience
        return self.epoch < self.settings.schedule.epochs and patient

    def train_epoch(self) -> Iterator[Step]:
        """One pass over the training text.

        Deviation: it starts from a zero state, the authors' from the last state of the validation pass.
        """
        epoch, words = self.epoch + 1, self.task.words_a_chunk
        bptt, batch = self.settings.task.bptt, self.settings.task.batch_size
        stream = Stream((self.settings.seed, "masks", epoch))
        lr = learning_rate(self.settings.schedule, epoch)
        state, began = self.model.zero_state(batch), time.perf_counter()
        for chunk in self.task.train_chunks():
            masks = self.model.masks(bptt, batch, stream.at(chunk.number))
            loss, state = self.task.loss(self.model, chunk, state, masks)
            norm, nats = self.optimiser.step(loss, epoch), loss.item() / bptt
            step = self.step + chunk.number + 1
            if not (math.isfinite(nats) and math.isfinite(norm)):
                raise Diverged(f"the loss is {nats} and its gradient's norm {norm} at epoch {epoch}, step {step}")
            now = time.perf_counter()
            yield Step(epoch, step, nats, norm, lr, words / (now - began))
            began = now

    def finish_epoch(self, losses: list[float], began: float) -> Epoch:
        """Validates, remembers the best epoch, and writes the checkpoint."""
        trained = time.perf_counter() - began
        measured = evaluate.validate(self.model, self.task)
        if not all(math.isfinite(value) for value in measured.values()):
            raise Diverged(f"the validation perplexity is {measured['valid_ppl_batched']} after epoch {self.epoch + 1}")
        self.epoch += 1
        if measured["valid_ppl_batched"] < self.best_ppl:
            self.best_epoch, self.best_ppl = self.epoch, measured["valid_ppl_batched"]
        seconds = time.perf_counter() - began
        self.seconds += seconds
        config, model = plain(self.settings), {name: t.cpu() for name, t in self.model.state_dict().items()}
        fingerprint = self.task.corpus.fingerprint
        checkpoint.save(Checkpoint(config, fingerprint, self.epoch, self.seconds, self.best_epoch, self.best_ppl, model), self.folder)
        loss = sum(losses) / len(losses)
        speed = len(losses) * self.task.words_a_chunk / trained
        lr = learning_rate(self.settings.schedule, self.epoch)
        return Epoch(self.epoch, self.step, loss, ppl(loss), **measured, lr=lr, words_per_second=speed, seconds=seconds)

    def result(self) -> Result:
        """The perplexities of the epoch that is reported."""
        patient = self.settings.schedule.patience is not None
        epoch = self.best_epoch if patient else self.epoch
        if epoch != self.epoch:
            self.model.load_state_dict(checkpoint.load(checkpoint.path_of(self.folder, epoch)).model)
        train_ppl = evaluate.train_perplexity(self.model, self.task)
        return Result(epoch, self.epoch, train_ppl, **evaluate.standard(self.model, self.task), seconds=self.seconds)


def records(run: Run) -> Iterator[Record]:
    """Trains to the end; yields a record for the start, every step, every epoch, and the result."""
    described = environment.describe(run.task.device, run.model.layers.backend, run.settings.precision.name)
    yield Start(plain(run.settings), run.task.corpus.fingerprint, run.epoch, described)
    while run.goes_on:
        began, losses = time.perf_counter(), []
        for step in run.train_epoch():
            losses.append(step.loss)
            yield step
        yield run.finish_epoch(losses, began)
    yield run.result()


def prepare(folder: Path, settings: Train) -> None:
    """Makes the run folder, empty of an earlier run where `force` is set, and writes the settings into it."""
    try:
        if settings.force and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(settings))))
    except OSError as error:
        raise ConfigError(f"outputs={settings.outputs}: {folder} cannot be written ({error.strerror}); choose another folder") from None


def run(settings: Train) -> None:
    device = environment.device(settings.device)
    environment.make_ready(device)
    chosen, precision = Backend[choose(settings.backend.name)], environment.precision(settings.precision, device)
    settings = replace(settings, device=str(device), backend=chosen, precision=precision)
    corpus = corpora.load(settings.data)
    folder = checkpoint.run_folder(settings, corpus.fingerprint)
    finished = folder / "result.json"
    if finished.exists() and not settings.force:
        print(f"{folder} is finished; force=true starts over")
        tell(read_result(folder))
        return
    task = LanguageModelling(settings.task, corpus, device)
    prepare(folder, settings)
    training = Run(settings, task, folder)
    speak = f"{settings.model.name}, dropout {settings.dropout.name}, {corpus.origin}, {device}, back end {chosen}, {precision}"
    print(f"{folder}: {speak}{f', going on after epoch {training.epoch}' if training.epoch else ''}", file=sys.stderr)
    listen(training)


def listen(training: Run) -> None:
    """Hands every record to every sink, and writes the result."""
    settings, folder = training.settings, training.folder
    progress = Progress(settings.schedule.epochs * training.task.chunks_an_epoch, settings.schedule.epochs, training.step)
    listeners: list[Sink] = [
        JsonLines(folder, settings.log_every, training.step),
        TensorBoard(folder, plain(settings), training.step),
        progress,
    ]
    last_step = training.step
    with ExitStack() as stack:
        sinks = [stack.enter_context(sink) for sink in listeners]
        try:
            for record in records(training):
                last_step = record.step if isinstance(record, Step) else last_step
                for sink in sinks:
                    sink(record)
        except Diverged as error:
            for sink in sinks:
                sink(Failure(str(error), training.epoch + 1, last_step))
            kept = checkpoint.all_in(folder)
            where = f"the last good checkpoint is {kept[0]}" if kept else "no epoch was finished"
            stack.close()
            print(f"vdrop: {error}; {where}. Try a smaller schedule.lr or schedule.clip, or another seed", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            stack.close()
            command = "the same command without force=true" if settings.force else "the same command"
            print(f"\nvdrop: interrupted; {command} goes on after epoch {training.epoch}", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            for sink in sinks:
                sink(Failure(f"{type(error).__name__}: {error}", training.epoch + 1, last_step))
            raise
    assert isinstance(record, Result)
    beside = folder / "result.tmp"
    beside.write_text(json.dumps(asdict(record), indent=2) + "\n")
    beside.replace(folder / "result.json")
    tell(asdict(record))


def tell(result: dict[str, float]) -> None:
    """The result for a person."""
    for name, value in result.items():
        print(f"{name:<24}{value:.2f}" if isinstance(value, float) else f"{name:<24}{value}")
