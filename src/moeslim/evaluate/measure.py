"""Everything that is measured on one model, on the ground that it shares with the others.

All processes do this together. What is timed, and the samples, are the first one's.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moeslim import __version__
from moeslim.artifacts.fingerprint import fingerprint
from moeslim.checkpoint.structure import read_structure
from moeslim.data.tokens import Decode, TokenDocument, load_tokenizer
from moeslim.errors import CheckpointError
from moeslim.evaluate import drafting, sampling
from moeslim.evaluate.agreement import TeacherStates
from moeslim.evaluate.engine import DRAFTS as ENGINE_DRAFTS
from moeslim.evaluate.engine import engine_figures
from moeslim.evaluate.generate import generate, sampler
from moeslim.evaluate.language import choose
from moeslim.evaluate.record import Record
from moeslim.evaluate.score import Layout, Scores, score
from moeslim.evaluate.settings import Settings
from moeslim.evaluate.share import own
from moeslim.evaluate.speed import peak_figure, restart_peak, size_figures, speed_figures
from moeslim.evaluate.walking import Walked, score_walking
from moeslim.families import Shape
from moeslim.figures import Figure
from moeslim.log import logger, progress
from moeslim.machine import parallel
from moeslim.model.load import load_student
from moeslim.model.student import Student
from moeslim.model.walk import WalkSettings

Figures = dict[str, dict[str, Figure]]

_PROMPTS_AT_ONCE = 32
_WINDOWS_AT_ONCE = 8  # where a model is walked
LAYER_BY_LAYER = ", layer by layer over its files"
WALKED = "walked layer by layer over its files: accepted drafts, speed, memory and samples need the whole model"


@dataclass(frozen=True)
class EvalData:
    """The held-out documents, how tokens become text, and the settings: the same for all models."""

    documents: list[TokenDocument]
    decode: Decode
    fingerprint: str
    settings: Settings

    @classmethod
    def of(cls, documents: Iterable[TokenDocument], *, tokenizer: Path | str, settings: Settings) -> "EvalData":
        """Choose and cut the documents as `settings` say; `fingerprint` names them."""
        loaded = load_tokenizer(tokenizer)
        decode = partial(loaded.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        per_domain, most = settings.evaluate.documents_per_domain, settings.document_tokens
        chosen = choose(documents, per_domain=per_domain, max_tokens=most, decode=decode)
        facts = [(d.source, d.domain, d.num_bytes, hashlib.sha256(d.tokens.tobytes()).hexdigest()) for d in chosen]
        return cls(chosen, decode, fingerprint(facts), settings)

    @property
    def layout(self) -> Layout:
        return Layout(window=self.settings.window, stride=self.settings.stride)

    def prompts(self, per_domain: int) -> tuple[torch.Tensor, Sequence[TokenDocument]]:
        """Held-out prompts on the device, and the document that each is from."""
        length = self.settings.evaluate.prompt_tokens
        rows, owners = drafting.prompts(self.documents, per_domain=per_domain, length=length)
        return rows.to(self.settings.device), owners


@dataclass(frozen=True)
class Job:
    """One model to measure: its folder and the fingerprints of all that its figures depend on.

    `walk`: layer by layer over its files, not whole in memory.
    """

    label: str
    folder: Path
    model: str
    teacher: str | None
    inputs: str
    walk: bool

    def walked(self, settings: Settings, out: Path) -> Walked:
        """How the model is walked; the work is in a hidden folder of `out`."""
        how = WalkSettings(
            _WINDOWS_AT_ONCE,
            dtype=getattr(torch, settings.dtype),
            device=settings.device,
            attn=settings.attn,
            max_memory=settings.max_memory,
        )
        return Walked(self.folder, self.model, out / f".{self.model}.walking", how)


def load(folder: Path, settings: Settings) -> Student:
    """The model in `folder`, ready to be measured."""
    dtype = getattr(torch, settings.dtype)
    return load_student(folder, dtype=dtype, device=settings.device, attn=settings.attn).eval()


def _check_finite(folder: Path, scores: Scores) -> None:
    """CheckpointError where the model's own loss is no number; nothing measured on it would mean anything."""
    bad = [source for source, value in zip(scores.sources, scores.nats, strict=True) if not math.isfinite(value)]
    if bad:
        raise CheckpointError(
            f"{folder}: its loss on {bad[0]} is NaN or Inf ({len(bad)} of {len(scores.nats)} documents); "
            "look for bad weights with `moeslim verify`"
        )


def measure_all(jobs: Sequence[Job], data: EvalData, *, silent: Job | None, out: Path) -> dict[str, Record]:
    """The records of `jobs` by label, each written to `out` when it is made.

    The model that the others are compared with comes first, or is `silent`: a teacher that gets no record.
    """
    records, states = {}, None
    if silent is not None:
        logger.info("evaluate: the teacher%s", LAYER_BY_LAYER if silent.walk else "")
        states = _score(silent, data, student=None, teacher=None, keep_states=True, out=out).states
    for job in jobs:
        keep = any(other.teacher == job.model for other in jobs)
        record, kept = measure(job, data, teacher=states, keep_states=keep, out=out)
        states = kept if keep else states
        if parallel.world().rank == 0:
            record.write(out / f"{job.label}.json")
        records[job.label] = record
    return records


def measure(
    job: Job, data: EvalData, *, teacher: TeacherStates | None, keep_states: bool, out: Path
) -> tuple[Record, TeacherStates | None]:
    """The record of one model; with `keep_states` also what the others are compared with.

    In processes behind the first it lacks speed, memory and samples; where a model is walked, all do.
    """
    logger.info("evaluate %s%s", job.label, LAYER_BY_LAYER if job.walk else "")
    settings, device, first = data.settings, torch.device(data.settings.device), parallel.world().rank == 0
    shape = read_structure(job.folder).shape
    figures: Figures = size_figures(shape, job.folder)
    student, samples, notes = None, [], [WALKED] if job.walk else []
    if settings.evaluate.engine != "none":
        parallel.barrier()
        if first:
            found, engine_notes = _engine(job, data, shape=shape)
            figures, notes = figures | found, [*notes, *engine_notes]
        parallel.barrier()
    if not job.walk:
        restart_peak(device)
        student = load(job.folder, settings)
        if settings.evaluate.speed_repeats:
            parallel.barrier()  # all processes idle while times are taken
            figures |= _speed(student, data) | peak_figure(device) if first else {}
            parallel.barrier()
    compared = teacher if job.teacher is not None else None
    scores = _score(job, data, student=student, teacher=compared, keep_states=keep_states, out=out)
    figures |= scores.figures()
    if student is not None:
        if settings.evaluate.prompts and student.mtp is not None:
            figures |= _drafting(student, data)
        samples = _samples(student, data) if settings.evaluate.samples and first else []
    record = _record(job, data, figures=figures, scores=scores)
    return replace(record, samples=samples, notes=notes), scores.states


def _score(
    job: Job,
    data: EvalData,
    *,
    student: Student | None,
    teacher: TeacherStates | None,
    keep_states: bool,
    out: Path,
) -> Scores:
    """The sums per document of `student`, or where that is None of the model in the job's folder."""
    if job.walk:
        scores = score_walking(job.walked(data.settings, out), data.documents, layout=data.layout, teacher=teacher)
    else:
        student = load(job.folder, data.settings) if student is None else student
        scores = score(student, data.documents, layout=data.layout, teacher=teacher, keep_states=keep_states)
    _check_finite(job.folder, scores)
    return scores


def _record(job: Job, data: EvalData, *, figures: Figures, scores: Scores) -> Record:
    loads = scores.load()
    return Record(
        label=job.label,
        inputs=job.inputs,
        model=job.model,
        teacher=job.teacher,
        data=data.fingerprint,
        settings=data.settings.facts() | {"through": "walk" if job.walk else "memory"},
        environment=_environment(torch.device(data.settings.device)),
        figures=figures,
        load={key: [round(figure.value, 4) for figure in layer] for key, layer in loads.items()},
        load_se={key: [figure.se and round(figure.se, 4) for figure in layer] for key, layer in loads.items()},
        documents=scores.columns(),
    )


def _speed(student: Student, data: EvalData) -> Figures:
    section = data.settings.evaluate
    prompt = torch.tensor(_stretches(data, 1)[0], device=student.head.device)
    return speed_figures(student, prompt, new_tokens=section.speed_new_tokens, repeats=section.speed_repeats)


def _engine(job: Job, data: EvalData, *, shape: Shape) -> tuple[Figures, list[str]]:
    settings = data.settings
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()  # what this process keeps free, the engine cannot have
    return engine_figures(
        job.folder.absolute(),
        _stretches(data, settings.evaluate.speed_repeats),
        new_tokens=settings.evaluate.speed_new_tokens,
        drafts=(0, ENGINE_DRAFTS) if shape.mtp_layers else (0,),
        python=settings.evaluate.engine_python,
    )


def _stretches(data: EvalData, number: int) -> list[list[int]]:
    """Up to `number` prompts to be timed: held-out text, document after document, in pieces of equal length."""
    tokens = [token for document in data.documents for token in document.tokens.tolist()]
    length = min(data.settings.evaluate.speed_prompt_tokens, len(tokens))
    return [tokens[i * length : (i + 1) * length] for i in range(min(number, len(tokens) // length))]


def _drafting(student: Student, data: EvalData) -> Figures:
    """Acceptance of drafts in greedy text, and in text that is drawn."""
    section = data.settings.evaluate
    first, new = section.prompt_tokens - 1, section.new_tokens  # the state that gives the first generated token

    def greedy(rows: torch.Tensor, _: int) -> dict[str, torch.Tensor]:
        text = generate(student, rows, new_tokens=new)
        drafted = drafting.draft(student, text, first=first)
        return {"": drafting.accepted(text.tokens, drafted, first=first).cpu()}

    def drawn(rows: torch.Tensor, begun: int) -> dict[str, torch.Tensor]:
        numbers = [np.random.default_rng([data.settings.seed, begun + row]).random(new) for row in range(len(rows))]
        choose = sampling.seeded(section.sampling_temperature, torch.from_numpy(np.stack(numbers)))
        text = generate(student, rows, new_tokens=new, choose=choose)
        return sampling.kept(student, text, first=first, temperature=section.sampling_temperature)

    kept, domains = _kept(data, section.prompts, kept=greedy)
    found = drafting.figures(kept[""], domains)
    if some := min(section.prompts, section.sampling_prompts):
        found |= sampling.figures(*_kept(data, some, kept=drawn))
    return found


def _kept(
    data: EvalData, per_domain: int, *, kept: Callable[[torch.Tensor, int], dict[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What `kept` returns for some prompts (B, P) and how many come before them, for all prompts; and their domains."""
    rows, owners = data.prompts(per_domain)
    parts = rows.split(_PROMPTS_AT_ONCE)
    mine, done = own([len(part) for part in parts]), {}
    with progress("draft", sum(len(parts[number]) for number in mine), unit="prompts") as advance:
        for number in mine:
            done[number] = kept(parts[number], number * _PROMPTS_AT_ONCE)
            advance(len(parts[number]))
    found = {number: part for one in parallel.gather(done) for number, part in one.items()}
    ways = {way: torch.cat([found[number][way] for number in range(len(parts))]) for way in found[0]}
    return ways, [owner.domain for owner in owners]


def _samples(student: Student, data: EvalData) -> list[dict[str, str]]:
    """Continuations of held-out beginnings; the same seed and prompts for every model."""
    settings, begun = data.settings, data.settings.evaluate.prompt_tokens
    rows, owners = data.prompts(settings.evaluate.samples)
    choice = sampler(settings.temperature, settings.seed)
    tokens = generate(student, rows, new_tokens=settings.sample_tokens, choose=choice).tokens.tolist()
    return [
        {
            "domain": owner.domain,
            "source": owner.source,
            "prompt": data.decode(row[1:begun]),
            "text": data.decode(row[begun:]),
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
