"""Waits for the checkpoints of a run, exports them and evaluates the exports."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Literal

from moiie_megatron.checkpoint.manifest import damage
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.evaluation.answers_file import AnswersFile
from moiie_megatron.evaluation.ask_export import ask_export
from moiie_megatron.evaluation.score import Outcome, Score
from moiie_megatron.evaluation.watch.checkpoints import SavedStep, last_step, saved_steps
from moiie_megatron.evaluation.watch.exports import export_step, prune_exports
from moiie_megatron.evaluation.watch.sets import QuestionSet, read_sets
from moiie_megatron.evaluation.watch.tasks import read_tasks, run_task, task_digest, value_of
from moiie_megatron.exported.model import ExportedModel
from moiie_megatron.training.logging.evaluations import (
    Evaluated,
    append_evaluated,
    read_evaluated,
)
from moiie_megatron.training.output_lock import OutputLock
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.progress import ProgressFn

LOGGER: Final = logging.getLogger(__name__)
WATCH_FILE: Final = "evaluating.json"  # the lock
ANSWERS_DIRECTORY: Final = "evaluation"
POLL: Final = 2.0  # seconds

Bar = Callable[[str, Literal["bytes", "records"]], AbstractContextManager[ProgressFn]]
"""Shows the progress of one piece of work; ``cli/progress_bar.py`` has one."""


@contextmanager
def no_bar(what: str, unit: Literal["bytes", "records"] = "bytes") -> Iterator[ProgressFn]:
    """Progress that nobody is shown."""
    yield lambda done, total: None


class Watcher:
    """Evaluates the checkpoints of one run, the oldest first.

    What ``evaluation.jsonl`` has of the same checkpoint and questions is not done again.  A
    checkpoint that cannot be evaluated, or that the run removes first, is named and left out.

    Args:
        output: The output directory of the run.
        config: Of the run; its ``evaluation`` section counts.
        bar: Shows progress.

    Attributes:
        failures: Evaluations that could not be done.

    Raises:
        UserError: The sets or tasks cannot be used.
    """

    def __init__(self, output: Path, config: RunConfig, bar: Bar = no_bar) -> None:
        self.failures = 0
        self._output, self._evaluation = output, config.evaluation
        self._bar = bar
        self._sets: dict[str, QuestionSet] = {s.name: s for s in read_sets(config.evaluation)}
        self._tasks = read_tasks(config.evaluation)
        self._names = [*self._sets, *(self._tasks.by_name if self._tasks else ())]
        self._settled: set[str] = set()  # ids: done, or given up
        self._last: dict[str, int | None] = {}  # by digest

    def run(self, *, wait: bool = True, poll: float = POLL) -> None:
        """Evaluate what there is, and with ``wait`` what comes, until the run has finished.

        Args:
            wait: For further checkpoints of a run that has not come to its last step.
            poll: Seconds between two looks.

        Raises:
            UserError: Another process evaluates this run, or a result cannot be written.
        """
        lock = OutputLock(
            self._output,
            name=WATCH_FILE,
            refusal=", where a process has been evaluating the checkpoints since",
        )
        lock.acquire()
        try:
            is_told = False
            while True:
                steps = saved_steps(self._output)
                due = self._due(steps)
                if due is not None:
                    self._evaluate(*due)
                    is_told = False
                    continue
                if not wait or (steps and steps[-1].step == self._last_step(steps[-1])):
                    return
                if not is_told:
                    is_told = True
                    LOGGER.info("%s: waiting for the next checkpoint.", self._output)
                time.sleep(poll)
        finally:
            lock.release()

    def _due(self, steps: list[SavedStep]) -> tuple[SavedStep, list[str]] | None:
        """The oldest checkpoint with something to do, and the names of what."""
        done = {one.id for one in read_evaluated(self._output)} | self._settled
        for saved in steps:
            # Of a checkpoint that does not tell the last step this may be it.
            is_due = not saved.step % self._evaluation.interval
            if not is_due and self._last_step(saved) not in (None, saved.step):
                continue
            if not saved.path.is_dir():
                continue
            names = [name for name in self._names if self._id(saved, name) not in done]
            if names:
                return saved, names
        return None

    def _last_step(self, saved: SavedStep) -> int | None:
        if saved.digest not in self._last:
            self._last[saved.digest] = last_step(saved.path)
        return self._last[saved.digest]

    def _id(self, saved: SavedStep, name: str) -> str:
        if name in self._sets:
            digest = self._sets[name].digest
        else:
            assert self._tasks is not None
            digest = task_digest(self._tasks, name, self._evaluation)
        parts = (saved.path.name, saved.digest, name, digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _evaluate(self, saved: SavedStep, names: list[str]) -> None:
        """Export a checkpoint and add a line for every name."""
        try:
            wrong = damage(saved.path)
            if wrong is not None:
                raise UserError(f"{saved.path} cannot be evaluated: {wrong}.")
            LOGGER.info("step %d: exporting", saved.step)
            with self._bar(f"exporting step {saved.step}", "bytes") as progress:
                export = export_step(self._output, saved, progress, self._note)
            in_sets = [name for name in names if name in self._sets]
            if in_sets:
                model = ExportedModel.load(export, device=self._evaluation.device)
                for name in in_sets:
                    self._report(self._ask(model, saved, self._sets[name]))
                del model
        except (UserError, OSError) as error:
            self._give_up(saved, names, error)
            return
        for name in (name for name in names if name not in self._sets):
            try:
                self._report(self._run_task(saved, name, export))
            except (UserError, OSError) as error:
                self._give_up(saved, [name], error)
        prune_exports(
            self._output, read_evaluated(self._output), self._names, self._evaluation.keep
        )

    def _ask(self, model: ExportedModel, saved: SavedStep, questions: QuestionSet) -> Evaluated:
        evaluation, ident = self._evaluation, self._id(saved, questions.name)
        file = AnswersFile(
            self._answers(saved) / f"{questions.name}.answers.jsonl", saved.path.name, ident
        )
        try:
            outcomes: list[Outcome] = file.read(questions.questions)
        except UserError:  # of another course of the run, or of other questions
            file.path.unlink()
            outcomes = []
        begin = time.monotonic()
        batches = ask_export(
            model,
            questions.questions[len(outcomes) :],
            questions.images,
            batch_size=evaluation.batch_size,
            max_new_tokens=evaluation.max_new_tokens,
            with_blanked=False,
        )
        with self._bar(questions.name, "records") as progress:
            for batch in batches:
                outcomes += batch
                file.append(batch)
                progress(len(outcomes), len(questions.questions))
        return Evaluated(
            saved.step,
            questions.name,
            "accuracy",
            Score(tuple(outcomes)).accuracy,
            questions=len(outcomes),
            errors=sum(bool(outcome.error) for outcome in outcomes),
            seconds=round(time.monotonic() - begin, 1),
            id=ident,
        )

    def _run_task(self, saved: SavedStep, name: str, export: Path) -> Evaluated:
        assert self._tasks is not None
        out = self._answers(saved) / f"tasks-{saved.digest[:8]}"
        outcome = run_task(
            self._tasks,
            name,
            export,
            out,
            self._evaluation,
            lambda what: self._bar(what, "records"),
        )
        assert outcome.metric is not None
        return Evaluated(
            saved.step,
            name,
            outcome.metric,
            value_of(outcome, self._tasks.by_name[name]),
            questions=outcome.requests,
            errors=outcome.errors,
            seconds=outcome.seconds,
            id=self._id(saved, name),
        )

    def _answers(self, saved: SavedStep) -> Path:
        return self._output / ANSWERS_DIRECTORY / saved.path.name

    def _report(self, result: Evaluated) -> None:
        self._settled.add(result.id)
        append_evaluated(self._output, result)
        LOGGER.info("%s", result)

    def _give_up(self, saved: SavedStep, names: list[str], error: Exception) -> None:
        left = [name for name in names if self._id(saved, name) not in self._settled]
        self._settled |= {self._id(saved, name) for name in left}
        self.failures += 1
        reason = str(error).rstrip(".")
        if not saved.path.is_dir():
            reason = f"the run has removed the checkpoint first (checkpoint.keep, {reason})"
        LOGGER.warning("step %d, %s: not evaluated, %s.", saved.step, ", ".join(left), reason)

    def _note(self, sentence: str) -> None:
        LOGGER.info("%s", sentence)
