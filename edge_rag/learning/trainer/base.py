"""The model that serves, as transformers has it: dequantised once, kept by the hash of its file.

<cache>/<sha256>/ has a model that transformers loads from safetensors, and facts.json; the folder appears whole
(renamed), and a lock keeps two trainers from writing it both. Dequantising takes 20 s to a minute for small models,
loading what was kept a second. The vocabulary is not needed: examples are token ids, made by the serving model's own
tokenizer.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from filelock import FileLock

from edge_rag.errors import ModelError
from edge_rag.learning.job import Job, write_whole
from edge_rag.learning.trainer.sizes import Facts
from edge_rag.store.fetching import storage_errors
from edge_rag.store.model_files import sha256_of, sync

FACTS = "facts.json"


class Base:
    """A base model by its GGUF file: its facts at once, its weights when they are asked for.

    Raises ModelError when the file is not the one that the job was made for, or says too little about itself.
    """

    def __init__(self, job: Job) -> None:
        self.file = Path(job.model)
        self.folder = Path(job.cache) / job.sha256
        if not self.file.is_file() or sha256_of(self.file) != job.sha256:
            raise ModelError(
                "the model is not the one that this training was prepared for",
                field=self.file.name,
                remedy="adapters belong to one model file; prepare the training anew",
            )
        self.facts = self._kept_facts() or read_facts(self.file)

    @property
    def kept(self) -> bool:
        """Whether its weights have been dequantised before."""
        return (self.folder / FACTS).exists()

    def load(self) -> Any:
        """The model in float32 on the processor, frozen. Raises ModelError when transformers cannot load it."""
        with storage_errors(self.folder):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(self.folder.with_suffix(".lock"), mode=0o600):
            if not self.kept:
                self._convert()
        return _from_pretrained(self.folder).eval().requires_grad_(False)

    def _kept_facts(self) -> Facts | None:
        try:
            return msgspec.json.decode((self.folder / FACTS).read_bytes(), type=Facts)
        except (OSError, msgspec.DecodeError):
            return None

    def _convert(self) -> None:
        """Dequantise beside the folder's place, then rename. Under the lock."""
        with storage_errors(self.folder):
            for left in self.folder.parent.glob(f".{self.folder.name}.*"):  # of a trainer that was killed
                shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            beside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
            beside.mkdir(mode=0o700)
            _save(_from_pretrained(self.file.parent, gguf_file=self.file.name), beside)
            write_whole(beside / FACTS, msgspec.json.encode(self.facts))
            for file in beside.iterdir():
                sync(file)
            beside.rename(self.folder)
            sync(self.folder.parent)


def _save(model: Any, folder: Path) -> None:
    """As a plain model: transformers itself refuses to save what it has dequantised."""
    from safetensors.torch import save_model

    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)


def _from_pretrained(folder: Path, **options: Any) -> Any:
    """Whatever transformers does not like is a ModelError: it has no errors of its own for it."""
    # Imported late: it takes seconds, and a job that is refused should be refused at once.
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, **options
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load it: {error}",
            field=options.get("gguf_file", folder.name),
            remedy="take another model",
        ) from error


def read_facts(file: Path) -> Facts:
    """The shapes in a GGUF file's header. Raises ModelError when it does not say them."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        return _facts(architecture, reader)
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"its header cannot be used for training: {error}", field=file.name) from error


def _facts(architecture: str, reader: Any) -> Facts:
    def number(name: str, default: int | None = None) -> int:
        field = reader.fields.get(f"{architecture}.{name}")
        if field is None and default is None:
            raise KeyError(name)
        return int(field.contents()) if field is not None else int(default or 0)

    hidden, heads = number("embedding_length"), number("attention.head_count")
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    return Facts(
        architecture=architecture,
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        layers=number("block_count"),
        hidden=hidden,
        forward=number("feed_forward_length"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head=number("attention.key_length", hidden // heads),
        vocabulary=shapes["token_embd.weight"][1],
    )
