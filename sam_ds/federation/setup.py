"""What happens before the first round: check everything cheap, then convert the base model into the run folder."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.tiers import check_tiers
from sam_ds.config import RunConfig, to_toml
from sam_ds.data.base_model import BaseRecipe, base_config, embedded_base_model
from sam_ds.data.batches import pack
from sam_ds.data.corpus import load_corpus
from sam_ds.data.partition import ClientData, partition_clients
from sam_ds.data.splits import Corpus
from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import from_pretrained, is_converted, readable
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import check_architecture, get_sam_model
from sam_ds.experts.factors import FACTORS_FILE, FROZEN, fit_factors, load_factors, save_factors
from sam_ds.experts.units import prepare
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.public import PublicText
from sam_ds.federation.state import checkpoints, unfinished, write_atomically, writing

_held: dict[Path, int] = {}
"""The locked files of this process, open until it ends: one that is closed is given up."""


def corpus_of(config: RunConfig) -> Corpus:
    """The run's text. Raises InputError as `load_corpus` does."""
    section = config.federation
    return load_corpus(config.data, public_every=section.public_every, forgetting=section.forgetting)


def clients_of(config: RunConfig, corpus: Corpus) -> list[ClientData]:
    """Which documents each client has."""
    section = config.federation
    return partition_clients(
        corpus, clients=section.clients, scheme=section.partition, alpha=section.alpha, seed=config.seed
    )  # fmt: skip


def check_model(config: RunConfig) -> None:
    """Everything about the model that its configuration alone can say, before weights are read.

    Raises InputError: no such model, no known FFN, E does not divide its neurons, a tier's memory is too small.
    """
    with readable(config.model):
        embedded = config.model == "embedded"
        architecture = base_config(BaseRecipe()) if embedded else AutoConfig.from_pretrained(config.model)
        model = check_architecture(architecture, SamConfig.of_run(config))
    check_tiers(model, config)
    dealt_tiers(config)


def prepare_base(config: RunConfig, run: Path, corpus: Corpus) -> Path:
    """Convert the base model into `run/base`, unless that is done already; returns the folder.

    A folder without the run's configuration is what an interrupted start left behind: it is made anew.
    """
    base = run / "base"
    if is_converted(base) and (run / "config.toml").is_file():
        hold(run)
        _prepare_factors(config, run, corpus)
        return base
    if config.model == "embedded":
        source = str(embedded_base_model(corpus, seed=config.seed))
    else:
        source = config.model
    with readable(source):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    _check_lengths(config, model, clients_of(config, corpus), tokenizer)
    calibration = PublicText(config, corpus, tokenizer).calibration
    get_sam_model(model, SamConfig.of_run(config), calibration=calibration)
    # After the last check: a start that is refused leaves the folder as it was.
    run.mkdir(parents=True, exist_ok=True)
    hold(run)
    with writing(base):
        made = unfinished(base)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(base, ignore_errors=True)
        os.replace(made, base)
    _prepare_factors(config, run, corpus)
    return base


def _prepare_factors(config: RunConfig, run: Path, corpus: Corpus) -> None:
    """Fit the frozen factors to the calibration text, where the configuration wants them and the run has not begun."""
    base, settings = run / "base", config.train
    if checkpoints(run / "checkpoints"):
        return
    trains = {METHODS[config.method].train(tier) for tier in config.tiers.values() if tier.share > 0.0}
    if settings.factors != "text" or trains != {"lora"}:
        (base / FACTORS_FILE).unlink(missing_ok=True)
        return
    model = from_pretrained(base, dtype=torch.float32)
    prepare(
        model, "lora", rank=settings.lora_rank, alpha=settings.lora_alpha, seed=config.seed,
        attention_rank=settings.attention_rank,
    )  # fmt: skip
    frozen = {name: p.shape for name, p in model.named_parameters() if name.endswith(FROZEN)}
    if {name: value.shape for name, value in load_factors(base).items()} == frozen:
        return
    tokenizer = AutoTokenizer.from_pretrained(base)
    save_factors(fit_factors(model, [PublicText(config, corpus, tokenizer).calibration]), base)


def _check_lengths(config: RunConfig, model: PreTrainedModel, clients: list[ClientData], tokenizer: Any) -> None:
    """Every client has a row to train on, and the model can read what it is given."""
    context = getattr(model.config, "max_position_embeddings", None)
    for name, length in (("train.sequence", config.train.sequence), ("evaluation.window", config.evaluation.window)):
        if context is not None and length > context:
            raise InputError(f"{name} = {length} is longer than the model's context of {context} tokens; lower it")
    for client in clients:
        try:
            pack(client.texts, tokenizer, config.train.sequence, limit_tokens=config.train.sequence)
        except InputError as error:
            raise InputError(f"train.sequence: client {client.client} of {len(clients)}: {error}") from error


def open_run(config: RunConfig, *, default_out: str) -> Path:
    """A fresh run folder holding the resolved configuration.

    The default folder gets a number when it is taken, so that the same command can be given twice. Raises
    InputError for any other folder that holds a run: nothing on disk is overwritten.
    """
    run = Path(config.out)
    if config.out == default_out:
        number = 2
        while (run / "config.toml").exists():
            run = Path(f"{default_out}-{number}")
            number += 1
    elif (run / "config.toml").exists():
        raise InputError(f"out={config.out} already holds a run; go on with --resume {config.out} or choose another")
    run.mkdir(parents=True, exist_ok=True)
    return run


def hold(run: Path) -> None:
    """Keep the run folder for this process, until it ends, on storage that all see. Raises InputError where another
    process is at work in it, as the ranks of a launcher that was killed are."""
    path = (run / ".running").resolve()
    if path in _held:
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 256).decode()
        os.close(file)
        raise InputError(f"out={run} is in use by process {holder or 'unknown'}: wait for it, or end it and go on with "
                         f"--resume {run}") from error
    os.truncate(file, 0)
    os.write(file, f"{os.getpid()} on {platform.node()}".encode())
    _held[path] = file


def check_node(config: RunConfig) -> None:
    """Raises InputError where a node of the federation lacks the run's converted base model."""
    base = Path(config.out) / "base"
    if not is_converted(base):
        raise InputError(f"there is no base model in {base}: copy the folder `base` of the server's run there, or say "
                         "where it is with the node-config key `out`")


def write_config(config: RunConfig, run: Path) -> None:
    """Put the resolved configuration into the run folder."""
    write_atomically(run / "config.toml", to_toml(config).encode())
