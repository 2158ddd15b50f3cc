"""What the trainer leaves behind does in llama.cpp, and in transformers, what was trained."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from edge_rag.errors import ModelError
from edge_rag.learning import job as jobs
from edge_rag.learning.events import Checkpoint, Finished, Loaded, Started
from edge_rag.learning.job import ADAPTER, PEFT, Proof
from edge_rag.learning.trainer import export, lora
from edge_rag.native.llama import Context, ContextSettings, LoRA, Model, Run
from edge_rag.store.model_files import hash_file
from tests.learning import training
from tests.learning.toy_jobs import toy_examples, toy_folder, toy_job
from tests.learning.training import make_loop, train

SETTINGS = ContextSettings(n_ctx=256, n_batch=64, n_seq_max=1)

pytestmark = training.MARKS


def served(model: Path, adapter: Path, proof: Proof) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """llama.cpp's logits [rows, vocabulary] of each of the proof's sequences: without and with the adapter."""
    with Model(model, gpu_layers=0) as loaded, LoRA(loaded, adapter) as worn, Context(loaded, SETTINGS) as context:
        for past, tokens, start in zip(
            jobs.pieces(proof.contexts, proof.context_ends),
            jobs.pieces(proof.tokens, proof.token_ends),
            proof.starts,
            strict=True,
        ):
            plain, own = (late(context, past.tolist(), tokens.tolist(), one)[start:] for one in (None, worn))
            yield plain, own


def late(context: Context, past: list[int], tokens: list[int], adapter: LoRA | None) -> np.ndarray:
    """Logits behind each token, with the context by the base and the tokens by the adapter."""
    context.clear(0)
    context.wear(None)
    context.decode([Run(past, 0, 0)])
    context.wear(adapter)
    rows = []
    for place, token in enumerate(tokens, start=len(past)):
        [last] = context.decode([Run([token], 0, place, logits=True)])
        rows.append(context.logits(last))
    return np.stack(rows)


def compare(ids: np.ndarray, logits: np.ndarray, norms: np.ndarray, found: np.ndarray) -> float:
    """The largest difference of logarithms of probability."""
    expected = logits - norms[:, None]
    actual = np.take_along_axis(found, ids, axis=1) - np.logaddexp.reduce(found, axis=1)[:, None]
    return float(np.abs(expected - actual).max())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", ["down", "ffn", "all"])
def test_llama_cpp_serves_what_torch_trained(
    name: str, targets: str, toy_models: dict[str, Path], toy_cache: Path, tmp_path: Path
) -> None:
    model = toy_models[name]
    train(toy_folder(tmp_path / "job", model, toy_cache, targets=targets, learning_rate=0.1))
    proof = jobs.read_proof(tmp_path / "job")
    moved = 0.0
    for number, (base, own) in enumerate(served(model, tmp_path / "job" / ADAPTER, proof)):
        rows = slice(int(proof.row_ends[number]), int(proof.row_ends[number + 1]))
        assert compare(proof.base_ids[rows], proof.base_logits[rows], proof.base_norms[rows], base) < 0.01
        assert compare(proof.adapter_ids[rows], proof.adapter_logits[rows], proof.adapter_norms[rows], own) < 0.01
        moved = max(moved, compare(proof.base_ids[rows], proof.base_logits[rows], proof.base_norms[rows], own))
    assert moved > 0.5  # else the comparison would mean nothing


@pytest.fixture(scope="module")
def done(toy_models: dict[str, Path], toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that is done."""
    folder = tmp_path_factory.mktemp("done") / "job"
    train(toy_folder(folder, toy_models["llama"], toy_cache, layers="last_half", targets="all"))
    return folder


def test_the_adapters_file_says_what_it_is(done: Path) -> None:
    reader = gguf.GGUFReader(done / ADAPTER)
    fields = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.lora.alpha"] == 8.0
    shapes = {tensor.name: (tensor.tensor_type.name, *map(int, tensor.shape)) for tensor in reader.tensors}
    assert len(shapes) == 14
    assert shapes["blk.1.ffn_down.weight.lora_a"] == ("F16", 96, 4)
    assert shapes["blk.1.ffn_down.weight.lora_b"] == ("F16", 4, 64)


def test_the_result_describes_the_file(done: Path) -> None:
    result = jobs.read_result(done)
    assert result is not None
    assert result.sha256 == hash_file(done / ADAPTER, None)
    assert result.bytes == (done / ADAPTER).stat().st_size
    assert (result.recipe.targets, result.recipe.layers, result.recipe.rank) == ("all", "last_half", 4)
    assert (result.recipe.epochs, result.recipe.examples, result.recipe.device) == (2, 24, "cpu")
    assert result.recipe.tokens > 0
    assert result.recipe.peak_bytes > 0
    assert result.note == ""


def test_what_is_left_behind_belongs_to_its_owner_alone_and_nothing_is_left_half_done(done: Path) -> None:
    assert not [file.name for file in done.iterdir() if file.name.startswith(".")]
    files = [file for file in done.rglob("*") if file.is_file() and file.name != "lock"]
    assert {file.name: file.stat().st_mode & 0o077 for file in files if file.stat().st_mode & 0o077} == {}


def test_the_peft_folder_does_in_transformers_what_was_trained(
    done: Path, toy_models: dict[str, Path], toy_cache: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert sorted(file.name for file in (done / PEFT).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(toy_cache) not in (done / PEFT / "adapter_config.json").read_text()
    proof = jobs.read_proof(done)
    folder = toy_cache / toy_job(toy_models["llama"], toy_cache).sha256
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), done / PEFT)
    past, tokens = (
        next(jobs.pieces(*pair)).astype(np.int64)
        for pair in ((proof.contexts, proof.context_ends), (proof.tokens, proof.token_ends))
    )
    with torch.no_grad():
        with model.disable_adapter():
            kept = model(input_ids=torch.tensor(past)[None], use_cache=True).past_key_values
        logits = model(input_ids=torch.tensor(tokens)[None], past_key_values=kept).logits[0, proof.starts[0] :].numpy()
    rows = slice(0, int(proof.row_ends[1]))
    assert compare(proof.adapter_ids[rows], proof.adapter_logits[rows], proof.adapter_norms[rows], logits) < 1e-3


def test_a_job_that_is_done_is_only_told(done: Path) -> None:
    before = (done / ADAPTER).stat().st_mtime_ns
    said = train(done)
    assert [type(event) for event in said] == [Finished]
    assert (done / ADAPTER).stat().st_mtime_ns == before


def test_numbers_that_float16_cannot_hold_are_refused(toy_models: dict[str, Path], toy_cache: Path) -> None:
    _, adapted = make_loop(toy_job(toy_models["llama"], toy_cache), toy_examples())
    with torch.no_grad():
        next(iter(lora.weights(adapted).values())).fill_(1e6)
    with pytest.raises(ModelError, match="float16"):
        export.round_weights(adapted)


def test_a_stopped_job_leaves_a_checkpoint_and_goes_on_from_it(
    toy_models: dict[str, Path], toy_cache: Path, tmp_path: Path
) -> None:
    folder = toy_folder(tmp_path / "job", toy_models["llama"], toy_cache)
    first = train(folder, turns=4)
    assert isinstance(first[-1], Checkpoint)
    assert not (folder / ADAPTER).exists()
    second = train(folder)
    loaded = next(event for event in second if isinstance(event, Loaded))
    assert loaded.done == first[-1].step > 0
    assert isinstance(second[0], Started)
    assert isinstance(second[-1], Finished)


def test_a_checkpoint_of_other_examples_is_noted_and_training_begins_anew(
    toy_models: dict[str, Path], toy_cache: Path, tmp_path: Path
) -> None:
    folder = toy_folder(tmp_path / "job", toy_models["llama"], toy_cache)
    train(folder, turns=4)
    toy_folder(folder, toy_models["llama"], toy_cache, examples=toy_examples(seed=9))
    said = train(folder)
    loaded = next(event for event in said if isinstance(event, Loaded))
    assert loaded.done == 0
    assert loaded.note == "the checkpoint was not used: it belongs to another job"
    assert isinstance(said[-1], Finished)
    assert said[-1].note == loaded.note
