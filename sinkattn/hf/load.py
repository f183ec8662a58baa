"""Load a causal language model and its tokenizer: from the hub, a folder, a GGUF file, or the package itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import cached_file

from sinkattn.hf import gguf_file
from sinkattn.hf.model_config import common_sliding_window
from sinkattn.hf.quantize import QUANTIZATIONS, Quantization, quantize_weights

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


def load(
    name: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    quantize: Quantization | None = None,
    spread: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode, and its tokenizer.

    Args:
        name: name on the Hugging Face hub, a folder, a GGUF file (``FILE.gguf``), or a GGUF file on the hub or in a
            folder (``NAME:FILE.gguf``); None for the small model that comes with sinkattn.
        device: default: CUDA if available, else the CPU.
        dtype: default: the checkpoint's; float32 for a GGUF file; bfloat16 with ``quantize``.
        quantize: "int8" or "int4" for the weights of linear layers (`sinkattn.hf.quantize`); None leaves them as they
            are. Activations and the cache have the dtype.
        spread: whether its heads and experts are spread over the processes that torchrun has started, each of which
            calls this: by transformers' plan for it (``tp_plan="auto"``), each on the accelerator of its number if
            there are any, else on the CPU. Takes neither ``device`` nor ``quantize`` nor a GGUF file.

    Raises:
        ValueError: if the model cannot be loaded or quantized, or the device is not available; the message is a single
            line.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize: expected one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    for what, value in (("device", device), ("quantize", quantize)):
        if spread and value is not None:
            raise ValueError(f"{what}: expected none for a model that is spread over processes, got {value}")
    if quantize is not None and dtype == "auto":
        dtype = torch.bfloat16
    device = None if spread else _device(device)
    try:
        with _no_progress_bars():
            model, tokenizer = _load(DEMO_MODEL if name is None else name, dtype, spread=spread)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model: cannot load {name}: {_reason(error)}") from error
    if device is not None:
        model = model.to(device)  # type: ignore[arg-type]  # transformers decorates `to` without its self
    model = model.eval()
    if quantize is not None:
        quantize_weights(model, quantize)
    return model, tokenizer


def advised_sinks(model: PreTrainedModel) -> tuple[int, str]:
    """The number of sinks to begin with, judged by the structure of a model alone, and why."""
    measured = "`sinkattn eval sinks` measures it"
    learned = sum(name.endswith(".sinks") for name, _ in model.named_parameters())
    if learned >= model.config.get_text_config(decoder=True).num_hidden_layers:
        return 0, f"all its layers have learned sinks in their softmax; {measured}"
    if common_sliding_window(model) is not None:
        return 4, f"though it may do without, as all its layers have a sliding window; {measured}"
    return 4, f"as most pretrained models need; {measured}"


def _load(
    name: str | Path, dtype: torch.dtype | str, *, spread: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what a name stands for: files and folders before names on the hub."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if spread:
            raise ValueError("a GGUF file cannot be spread over processes")
        path = _gguf_path(str(name), path)
        with gguf_file.opened(path) as file:
            return _from_pretrained(
                path.parent, {"gguf_file": file}, dtype, quantization_config=GgufConfig(dequantize=True)
            )
    if path.is_file():
        raise ValueError("expected a folder, a GGUF file (.gguf) or a name on the hub, and this is another file")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder has no config.json{_gguf_hint(path)}")
        name = path
    elif isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise ValueError("there is no such file or folder")
    if not spread:
        return _from_pretrained(name, {}, dtype)
    from transformers.distributed.configuration_utils import DistributedConfig

    from sinkattn.hf.process_group import begin_process_group

    begin_process_group()
    return _from_pretrained(name, {}, dtype, distributed_config=DistributedConfig(tp_plan="auto"))


def _from_pretrained(
    name: str | Path, file: dict[str, str], dtype: torch.dtype | str, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, all of whose weights must be there, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name, **file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, dtype=dtype, **file, **options)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it has no weights for {missing[0]} ({len(missing)} missing in all)")
    return model, tokenizer


def _gguf_path(name: str, path: Path) -> Path:
    """The local file that ``FILE.gguf`` or ``NAME:FILE.gguf`` stands for, fetched from the hub if need be."""
    if path.is_file():
        return path
    source, colon, file = name.rpartition(":")
    folder = Path(source).expanduser()
    if not colon or (source.startswith((".", "/", "~")) and not folder.is_dir()):
        raise ValueError("there is no such file")
    if not folder.is_dir():
        return Path(str(cached_file(source, file)))
    if not (folder / file).is_file():
        raise ValueError(f"the folder {source} has no file {file}")
    return folder / file


def _gguf_hint(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    return f"; to load its GGUF file, give {folder}:{files[0]}" if files else ""


def _reason(error: Exception) -> str:
    """Why a model cannot be loaded, in one line."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "it is gated: accept its terms on its page of the hub, then `hf auth login`"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "there is no such folder, and no such model on the hub (or it is private: `hf auth login`)"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is no device of torch") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: no such device here: {device}")
    return device


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
