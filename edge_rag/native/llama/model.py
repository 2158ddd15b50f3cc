"""A GGUF model: weights (or only its vocabulary), tokens, metadata, chat template."""

import ctypes
import itertools
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib

from edge_rag.closing import Closing
from edge_rag.errors import EngineError, ModelError
from edge_rag.native.llama import library

_MARKUP = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
_CAUSES = (
    ("magic", "it is not a GGUF file", "import the right file"),
    ("unknown model architecture", "this llama.cpp does not know its architecture", "use another model"),
    ("allocate", "there is not enough memory for it", "use a smaller model or quantisation"),
    ("corrupted", "the file is incomplete", "run `edge-rag models verify`, then pull it again"),
    ("not within the file bounds", "the file is incomplete", "run `edge-rag models verify`, then pull it again"),
)


class Model(Closing):
    """A loaded model. `vocab_only` loads no weights: enough to count tokens, in a fraction of a second.

    Thread-safe for tokenising. Close it (or leave its `with`) after every context on it. Raises ModelError when the
    file cannot be loaded, naming the file and the likely cause.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, gpu_layers: int = -1) -> None:
        library.start()
        self.path = path
        self._lock = threading.Lock()  # a closing thread must not free what another one reads
        params = lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 999
        params.use_extra_bufts = not library.amx_is_broken()
        library.clear_log()
        if not path.is_file():
            raise ModelError("there is no such file", field=str(path), remedy="run `edge-rag models list`")
        self.handle: Any = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise _load_error(path)
        self._vocab = lib.llama_model_get_vocab(self.handle)

    def close(self) -> None:
        """Free the weights, after what is being tokenised. Idempotent."""
        with self._lock:
            if self.handle:
                lib.llama_model_free(self.handle)
                self.handle = None

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS or EOS. With `special=False` '<|im_end|>' and the like are plain text."""
        tokens = self._tokenize(text, special)
        hidden = None if special else next((token for token in tokens if token in self._markup), None)
        if hidden is None:
            return tokens
        # llama.cpp finds tokens of the kind 'user defined' whatever it is told: cut their text apart and try again.
        mark = self.piece(hidden, special=True).decode("utf-8", "replace")
        first, *others = text.split(mark)
        if not others or len(mark) < 2:
            return tokens
        ends = [first, *(mark[1:] + other for other in others)]
        parts = [*(end + mark[0] for end in ends[:-1]), ends[-1]]
        return [token for part in parts for token in self.tokenize(part)]

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 16
        tokens = (lib.llama_token * size)()
        with self._lock:
            if not self.handle:
                raise EngineError("the model is closed", field=str(self.path), remedy="open the library again")
            count = lib.llama_tokenize(self._vocab, data, len(data), tokens, size, False, special)
        if count < 0:
            raise EngineError(f"llama_tokenize returned {count} for {len(data)} bytes")
        return list(itertools.islice(tokens, count))

    @cached_property
    def _markup(self) -> frozenset[int]:
        """Tokens that stand for markup such as '<tool_call>'; some vocabularies also define runs of plain text."""
        marked = (n for n in range(self.vocab_size) if lib.llama_vocab_get_attr(self._vocab, n) & _MARKUP)
        return frozenset(token for token in marked if self.piece(token, special=True)[:1] in (b"<", b"["))

    def count_tokens(self, text: str) -> int:
        """How many tokens `text` has as content."""
        return len(self.tokenize(text))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; a token may be part of a character. Special tokens are b'' unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def text(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of `tokens`."""
        return b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", "replace")

    def ends_generation(self, token: int) -> bool:
        """Whether the model means 'done' by this token."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @property
    def bos(self) -> int | None:
        """The BOS token, when the model wants one at the start of a prompt."""
        return int(lib.llama_vocab_bos(self._vocab)) if lib.llama_vocab_get_add_bos(self._vocab) else None

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(lib.llama_vocab_n_tokens(self._vocab))

    @property
    def n_ctx_train(self) -> int:
        """Context length the model was trained for, in tokens."""
        return int(lib.llama_model_n_ctx_train(self.handle))

    @property
    def n_ctx_original(self) -> int:
        """Context length before it was extended by scaling, in tokens; 0 when the model does not say."""
        arch = self.metadata("general.architecture")
        return int(self.metadata(f"{arch}.rope.scaling.original_context_length") or 0)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return int(lib.llama_model_size(self.handle))

    @property
    def description(self) -> str:
        """llama.cpp's own description, e.g. 'qwen2 1B Q4_K - Medium'."""
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def metadata(self, key: str) -> str:
        """A value of the GGUF's metadata as text, '' when it has none under this key."""
        buffer = ctypes.create_string_buffer(256)
        length = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    @property
    def chat_template(self) -> str:
        """The Jinja source of the model's chat template. Raises ModelError when it has none."""
        source = lib.llama_model_chat_template(self.handle, None)
        if not source:
            raise ModelError(
                "the model has no chat template", field=str(self.path), remedy="use an instruction-tuned model"
            )
        return bytes(source).decode("utf-8")

    def token_text(self, name: str) -> str:
        """The text of the model's 'bos' or 'eos' token, '' when it has none."""
        token = int(lib.llama_vocab_bos(self._vocab) if name == "bos" else lib.llama_vocab_eos(self._vocab))
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")


def _load_error(path: Path) -> ModelError:
    said = library.complaints()
    for sign, cause, remedy in _CAUSES:
        if sign in said.lower():
            return ModelError(f"cannot be loaded: {cause} ({said})", field=str(path), remedy=remedy)
    return ModelError(
        f"cannot be loaded ({said or 'no reason given'})", field=str(path), remedy="run `edge-rag doctor`"
    )
