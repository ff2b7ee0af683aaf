"""Everything that is measured on one model, on the ground that it shares with the others.

All processes do this together. What is timed, and the samples, are the first one's.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from moeslim import __version__
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.data.tokens import TokenDocument, load_tokenizer
from moeslim.errors import CheckpointError
from moeslim.evaluate import drafting
from moeslim.evaluate.agreement import TeacherStates
from moeslim.evaluate.generate import generate, sampler
from moeslim.evaluate.language import Decode, choose
from moeslim.evaluate.record import Figure, Record
from moeslim.evaluate.score import Layout, Scores, score
from moeslim.evaluate.settings import Settings
from moeslim.evaluate.share import own
from moeslim.evaluate.speed import peak_figure, restart_peak, size_figures, speed_figures
from moeslim.log import logger, progress
from moeslim.model import parallel
from moeslim.model.load import load_student
from moeslim.model.student import Student

Figures = dict[str, dict[str, Figure]]

_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class Ground:
    """What is the same for all models: the documents as they are read, how tokens become text, and the settings."""

    documents: list[TokenDocument]
    decode: Decode
    fingerprint: str
    settings: Settings

    @classmethod
    def of(cls, documents: Iterable[TokenDocument], *, tokenizer: Path | str, settings: Settings) -> "Ground":
        """Choose and cut the documents as `settings` say; `fingerprint` names them."""
        loaded = load_tokenizer(tokenizer)
        decode = partial(loaded.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        chosen = choose(
            documents, per_domain=settings.documents_per_domain, max_tokens=settings.document_tokens, decode=decode
        )
        facts = [(d.source, d.domain, d.num_bytes, hashlib.sha256(d.tokens.tobytes()).hexdigest()) for d in chosen]
        return cls(chosen, decode, fingerprint(facts), settings)

    @property
    def layout(self) -> Layout:
        return Layout(window=self.settings.window, stride=self.settings.stride or self.settings.window)

    def prompts(self, per_domain: int) -> tuple[torch.Tensor, Sequence[TokenDocument]]:
        """Held-out prompts on the device, and the document that each is from."""
        rows, owners = drafting.prompts(self.documents, per_domain=per_domain, length=self.settings.prompt_tokens)
        return rows.to(self.settings.device), owners


@dataclass(frozen=True)
class Job:
    """One model to measure: its folder and the fingerprints of all that its figures depend on."""

    label: str
    folder: Path
    model: str
    teacher: str | None
    inputs: str


def load(folder: Path, settings: Settings) -> Student:
    """The model in `folder`, ready to be measured."""
    dtype = getattr(torch, settings.dtype)
    return load_student(folder, dtype=dtype, device=settings.device, attn=settings.attn).eval()


def teacher_states(folder: Path, ground: Ground) -> TeacherStates:
    """What the model in `folder` says at every scored position."""
    scores = score(load(folder, ground.settings), ground.documents, layout=ground.layout, keep_states=True)
    _check_finite(folder, scores)
    assert scores.states is not None
    return scores.states


def _check_finite(folder: Path, scores: Scores) -> None:
    """CheckpointError where the model's own loss is no number; nothing measured on it would mean anything."""
    bad = [source for source, value in zip(scores.sources, scores.nats, strict=True) if not math.isfinite(value)]
    if bad:
        raise CheckpointError(
            f"{folder}: its loss on {bad[0]} is NaN or Inf ({len(bad)} of {len(scores.nats)} documents); "
            "look for bad weights with `moeslim verify`"
        )


def measure_all(jobs: Sequence[Job], ground: Ground, *, silent: Path | None, out: Path) -> dict[str, Record]:
    """The records of `jobs` by label, each written to `out` when it is made.

    Whoever the others are compared with comes first, or is `silent`: a teacher that gets no record.
    """
    records, states = {}, None if silent is None else teacher_states(silent, ground)
    for job in jobs:
        keep = any(other.teacher == job.model for other in jobs)
        record, kept = measure(job, ground, teacher=states, keep_states=keep)
        states = kept if keep else states
        if parallel.world().rank == 0:
            record.write(out / f"{job.label}.json")
        records[job.label] = record
    return records


def measure(
    job: Job, ground: Ground, *, teacher: TeacherStates | None, keep_states: bool = False
) -> tuple[Record, TeacherStates | None]:
    """The record of one model; with `keep_states` also what the others are compared with.

    In processes behind the first it lacks speed, memory and samples.
    """
    logger.info("evaluate %s", job.label)
    settings, device, first = ground.settings, torch.device(ground.settings.device), parallel.world().rank == 0
    restart_peak(device)
    student = load(job.folder, settings)
    figures: Figures = size_figures(student.config, job.folder, has_mtp=student.mtp is not None)
    if settings.speed_repeats:
        parallel.barrier()  # nobody is busy while times are taken
        figures |= _speed(student, ground) | peak_figure(device) if first else {}
        parallel.barrier()
    compared = teacher if job.teacher is not None else None
    scores = score(student, ground.documents, layout=ground.layout, teacher=compared, keep_states=keep_states)
    _check_finite(job.folder, scores)
    figures |= scores.figures()
    if settings.prompts and student.mtp is not None:
        figures |= _drafting(student, ground)
    samples = _samples(student, ground) if settings.samples and first else []
    return _record(job, ground, figures=figures, scores=scores, samples=samples), scores.states


def _record(job: Job, ground: Ground, *, figures: Figures, scores: Scores, samples: Sequence[dict[str, str]]) -> Record:
    loads = scores.load()
    return Record(
        label=job.label,
        inputs=job.inputs,
        model=job.model,
        teacher=job.teacher,
        data=ground.fingerprint,
        settings=asdict(ground.settings),
        environment=_environment(torch.device(ground.settings.device)),
        figures=figures,
        load={key: [round(figure.value, 4) for figure in layer] for key, layer in loads.items()},
        load_se={key: [figure.se and round(figure.se, 4) for figure in layer] for key, layer in loads.items()},
        documents=scores.columns(),
        samples=samples,
    )


def _speed(student: Student, ground: Ground) -> Figures:
    settings = ground.settings
    tokens = [token for document in ground.documents for token in document.tokens.tolist()]
    prompt = torch.tensor(tokens[: settings.speed_prompt_tokens], device=student.head.device)
    return speed_figures(student, prompt, new_tokens=settings.speed_new_tokens, repeats=settings.speed_repeats)


def _drafting(student: Student, ground: Ground) -> Figures:
    rows, owners = ground.prompts(ground.settings.prompts)
    first = ground.settings.prompt_tokens - 1  # the state that gives the first generated token
    parts = rows.split(_PROMPTS_AT_ONCE)
    mine, done = own([len(part) for part in parts]), {}
    with progress("draft", sum(len(parts[number]) for number in mine), unit="prompts") as advance:
        for number in mine:
            written = generate(student, parts[number], new_tokens=ground.settings.new_tokens)
            drafted = drafting.draft(student, written, first=first)
            done[number] = drafting.accepted(written.tokens, drafted, first=first).cpu()
            advance(len(parts[number]))
    accepted = {number: part for found in parallel.gather(done) for number, part in found.items()}
    whole = torch.cat([accepted[number] for number in range(len(parts))])
    return drafting.figures(whole, [owner.domain for owner in owners])


def _samples(student: Student, ground: Ground) -> list[dict[str, str]]:
    """Continuations of held-out beginnings; the same seed and prompts for every model."""
    settings = ground.settings
    rows, owners = ground.prompts(settings.samples)
    choice = sampler(settings.temperature, settings.seed)
    tokens = generate(student, rows, new_tokens=settings.sample_tokens, choose=choice).tokens.tolist()
    return [
        {
            "domain": owner.domain,
            "source": owner.source,
            "prompt": ground.decode(row[1 : settings.prompt_tokens]),
            "text": ground.decode(row[settings.prompt_tokens :]),
        }
        for row, owner in zip(tokens, owners, strict=True)
    ]


def _environment(device: torch.device) -> dict[str, Any]:
    """What speeds and the last bits depend on."""
    return {
        "moeslim": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
