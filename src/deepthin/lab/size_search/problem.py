"""What all candidates of a search share: the networks with their matrices, and what may be chosen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepthin.errors import ConfigError
from deepthin.lab.run import Run, Setup
from deepthin.lab.size_search.candidate import Candidate, Settings
from deepthin.lab.size_search.configuration import rules_of
from deepthin.lab.size_search.groups import Matrices, matrices_of
from deepthin.lab.size_search.settings import Wanted
from deepthin.lab.size_search.space import OWN, Space, default_floats, default_training
from deepthin.lab.size_search.space_file import read, widened
from deepthin.lab.size_search.starts import Usual
from deepthin.lab.size_search.training import Job
from deepthin.lab.tasks.own import Named, spelled
from deepthin.lab.trial import prepared

RECURRENT_DECAY = 0.1  # of tasks that say nothing: without it, factors of recurrent layers grow (docs/training.md)


@dataclass(frozen=True)
class Problem:
    """A search, prepared.

    Attributes:
        wanted: What the user asks for.
        run: The task with its data and network.
        also: Name -> factory of a further network.
        networks: Name of each network -> its matrices.
        space: What may be chosen.
        usual: What the task is trained with.
    """

    wanted: Wanted
    run: Run
    also: Mapping[str, Named]
    networks: Mapping[str, Matrices]
    space: Space
    usual: Usual

    @classmethod
    def prepare(cls, wanted: Wanted) -> "Problem":
        """Load the data, build all networks, and check what the user gave.

        Args:
            wanted: What the user asks for.

        Returns:
            The search.

        Raises:
            ConfigError: The data are missing, a network cannot be built or called, or the space is invalid.
        """
        run = prepared(wanted.setup)
        also = {spelled(factory): factory for factory in wanted.also}
        networks = {OWN: matrices_of(run.build(run.width))}
        for name, factory in also.items():
            networks[name] = _checked(run, name, factory)
        own = networks[OWN]
        floats = default_floats(wanted.file_bytes, own.weights())
        rate, coded = (run.choice(f"{method}-coded").lr for method in ("deepthin", "dense"))
        decay = run.task.decays.get("deepthin-coded", RECURRENT_DECAY if "recurrent" in own.groups else 0.0)
        training = default_training(rate, (OWN, *also), run.teacher is not None)
        space = widened(read(wanted.space), training, own, floats)
        return cls(wanted, run, also, networks, space, Usual(rate, coded, decay, floats))

    def about(self) -> dict[str, str]:
        """All that proposals and results depend on, as text: a search goes on only with the same.

        Returns:
            Name -> text.
        """
        found: dict[str, Any] = {
            "task": self.run.task.name,
            "data": self.run.data.about,
            "network": self.run.build(self.run.width),
            "steps": self.run.steps,
            "shortest training": self.wanted.least_steps,
            "file bytes": self.wanted.file_bytes,
            "microseconds": self.wanted.microseconds,
            "seed": self.wanted.seed,
            "space": self.space,
            "teacher": None if self.run.teacher is None else self.run.teacher[0].about(),
        }
        return {name: str(value) for name, value in found.items()}

    def rules(self, candidate: Candidate) -> dict[str, Any]:
        """The configuration of a candidate.

        Args:
            candidate: The candidate.

        Returns:
            A mapping as ``compress`` takes it.
        """
        return rules_of(candidate.settings, self.space, self.networks, self.wanted.file_bytes)

    def identity(self, settings: Settings) -> str:
        """All that a training depends on: other settings may come to the same, where a matrix is small.

        Args:
            settings: Settings of a candidate.

        Returns:
            A text.
        """
        rules = rules_of(settings, self.space, self.networks, self.wanted.file_bytes)
        return json.dumps([rules, *(settings[name] for name in sorted(self.space.training))])

    def setup(self, candidate: Candidate, steps: int) -> Setup:
        """The setup of a training.

        Args:
            candidate: The candidate.
            steps: Number of steps.

        Returns:
            The setup, with the network of the candidate.
        """
        factory = self.also.get(str(candidate.settings["network"]))
        return replace(self.wanted.setup, steps=steps, factory=factory)

    def job(self, candidate: Candidate, steps: int, out: Path, seconds: float) -> Job:
        """One training of a candidate.

        Args:
            candidate: The candidate.
            steps: Number of steps.
            out: The folder of the search.
            seconds: Time for the training.

        Returns:
            The job.
        """
        settings = candidate.settings
        return Job(
            setup=self.setup(candidate, steps),
            rules=self.rules(candidate),
            lr=float(settings["lr"]),
            decay=float(settings["decay"]),
            taught=bool(settings["teacher"]),
            seed=self.wanted.seed,
            folder=out,
            file=f"trials/{candidate.number:03}-{steps}.thin",
            seconds=seconds,
            identity=json.dumps([self.about(), self.identity(settings)]),
        )


def _checked(run: Run, name: str, factory: Named) -> Matrices:
    """The matrices of a network of --also, which must take the task's items."""
    model = run.with_factory(factory).build(1)
    try:
        with torch.no_grad():
            model.eval()(*run.task.example(run.data))
    except Exception as error:  # whatever the user's network makes of it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--also {name} cannot be called with one item of {run.task.name}: {reason}") from None
    return matrices_of(model)
