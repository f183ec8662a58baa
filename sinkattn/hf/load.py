"""Load a causal language model and its tokenizer: by name, from a folder, or the demo model of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sinkattn.hf.model_config import trained_length

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


def load(
    name: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode, and its tokenizer.

    Args:
        name: name on the Hugging Face hub, or a folder; None for the small model that comes with sinkattn.
        device: default: CUDA if available, else the CPU.
        dtype: default: the checkpoint's.

    Raises:
        ValueError: if the model cannot be loaded or the device is not available; the message is a single line.
    """
    name = DEMO_MODEL if name is None else name
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
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # transformers decorates `to` without its self


def default_window(model: PreTrainedModel, num_sinks: int, max_window: int = 1020) -> int:
    """Largest window up to ``max_window`` for which ``num_sinks + window`` fits the model; at least 1."""
    config = model.config.get_text_config(decoder=True)
    # A sliding window of the model is a limit only if all layers have it; in mixed models those layers keep theirs.
    is_mixed = "full_attention" in (getattr(config, "layer_types", None) or ())
    sliding_window = None if is_mixed else getattr(config, "sliding_window", None)
    limits = [length - num_sinks for length in (trained_length(model), sliding_window) if length is not None]
    return max(1, min([max_window, *limits]))


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
