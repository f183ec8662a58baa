"""Loading a causal language model and its tokenizer: by name, from a folder, or the ones that ship with sinkattn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sinkattn.hf.model_config import trained_length

SHIPPED = Path(__file__).parents[1] / "demo_model"


def load(
    name: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode, and its tokenizer.

    Args:
        name: name on the Hugging Face hub, or folder; None for the small model that ships with sinkattn.
        device: default: CUDA if there is such a device, else the CPU.
        dtype: default: that of the checkpoint.

    Raises:
        ValueError: for a model, device or dtype that cannot be had; the message is one line.
    """
    name = SHIPPED if name is None else name
    device = _device(device)
    if isinstance(name, str) and name.startswith((".", "/", "~")):
        name = Path(name).expanduser()
    if isinstance(name, Path) and not (name / "config.json").is_file():
        raise ValueError(f"model: no folder with a transformers model at {name}")
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        lines = str(error).strip().splitlines()
        raise ValueError(f"model: cannot load {name}: {lines[0] if lines else type(error).__name__}") from error
    return model.to(device).eval(), tokenizer


def default_window(model: PreTrainedModel, num_sinks: int, most: int = 1020) -> int:
    """Window of ``most`` tokens, or less where sinks and window would not fit the model."""
    config = model.config.get_text_config(decoder=True)
    # Layers with a window of their own keep it, unless all have one.
    mixed = "full_attention" in (getattr(config, "layer_types", None) or ())
    native = None if mixed else getattr(config, "sliding_window", None)
    lengths = [length - num_sinks for length in (trained_length(model), native) if length is not None]
    return max(1, min([most, *lengths]))


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
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
