"""llama.cpp with its context shift, through its server's completions, called within the process.

When the context is full, the server drops half of what is behind the first `n_keep` tokens and moves the rest. Its
tokens come through a callback; a token's time is the time since the one before.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import xllamacpp
from runner import WARM_UP, serve

KV_TYPES = {"float16": (xllamacpp.ggml_type.GGML_TYPE_F16, 2), "float32": (xllamacpp.ggml_type.GGML_TYPE_F32, 4)}


class LlamaCpp:
    packages = ("xllamacpp",)

    def __init__(self, job: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = job["model"]
        params.n_ctx, params.n_keep, params.ctx_shift = job["cache"], job["sinks"], True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        kv_type, element_bytes = KV_TYPES[job["options"]["kv"]]
        params.cache_type_k = params.cache_type_v = kv_type
        params.n_parallel = 1
        # No states of earlier prompts are kept, and no parameter is fitted to the free memory.
        params.cache_ram_mib, params.fit_params = 0, False
        self._kv_bytes = job["kv_elements"] * job["cache"] * element_bytes
        self._ids, self._prompt = job["ids"], job["prompt"]
        self._server = xllamacpp.Server(params)

    def kv_bytes(self) -> int:
        return self._kv_bytes

    def time(self, tokens: int, seconds: float) -> list[float]:
        """See `runner.Runner.time`; each turn begins with the prompt, as a request cannot be interrupted and go on."""
        arrivals: list[tuple[float, str]] = []

        def receive(text: str, _: Any) -> bool:
            arrivals.append((time.perf_counter(), text))
            return len(arrivals) > WARM_UP and arrivals[-1][0] - arrivals[WARM_UP - 1][0] > seconds

        self._complete({"n_predict": WARM_UP + tokens}, receive)
        timed = arrivals[WARM_UP - 1 :]
        # Text that is not ASCII can be that of several tokens: the server waits until a character is complete.
        return [(end - start) * 1e3 for (start, _), (end, text) in pairwise(timed) if text.isascii()]

    def score(self, tokens: int) -> tuple[list[float | None], list[int | None]]:
        """See `runner.Runner.score`: a grammar with one token at each place makes it generate the text."""
        text = self._ids[self._prompt : self._prompt + tokens]
        predictions: list[dict[str, Any]] = []

        def receive(_: str, logprobs: Any) -> bool:
            predictions.extend((logprobs or {}).get("content", []))
            return False

        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in text)
        self._complete({"n_predict": tokens, "grammar": grammar, "logprobs": 1}, receive)
        losses: list[float | None] = [None] * tokens
        likeliest: list[int | None] = [None] * tokens
        # The same merging of tokens into characters loses predictions; what came is matched to the text in order.
        at = 0
        for prediction in predictions:
            at = text.index(prediction["id"], at)
            losses[at], likeliest[at] = -prediction["logprob"], prediction["top_logprobs"][0]["id"]
            at += 1
        return losses, likeliest

    def _complete(self, options: dict[str, Any], receive: Callable[[str, Any], bool]) -> None:
        """Complete the prompt greedily. ``receive`` gets text and logprobs of each token, and says whether to stop."""

        errors: list[str] = []

        def on_event(event: dict[str, Any]) -> bool:
            # What is raised here is lost in the server.
            if "error" in event:
                errors.append(event["error"]["message"])
                return True
            choice = event["choices"][0]
            return choice["finish_reason"] is None and receive(choice["text"], choice["logprobs"])

        request = {"prompt": self._ids[: self._prompt], "temperature": 0, "ignore_eos": True, "stream": True}
        self._server.handle_completions({**request, "cache_prompt": False, **options}, on_event)
        if errors:
            raise RuntimeError(errors[0])


if __name__ == "__main__":
    serve(LlamaCpp)
