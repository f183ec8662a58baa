"""bench/compare: its table, its processes and what its peers do, without the peers' own packages."""

import importlib.util
import json
import math
import sys
import time
import types
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module as module
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkattn.hf.load import DEMO_MODEL
from sinkattn.hf.quantize import weight_bytes

FOLDER = Path(__file__).parents[1] / "bench" / "compare"


@pytest.fixture(autouse=True, scope="module")
def compare_on_path():
    before = sys.path[:]
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path[:] = before


def result(name: str, bits: int, **measured):
    return module("measure").Result(name, bits, **measured)


def content(results, tokens=4) -> dict:
    return {
        "machine": {"processor": "Some CPU", "cores": 2},
        "settings": {"threads": 2, "model": "m.gguf", "text": "t.txt", "cache": 256, "sinks": 4},
        "plan": {"text_tokens": tokens},
        "other_work_percent": 1.25,
        "rows": module("report").figures(results),
    }


BASELINE = {"ms": [[10.0, 12.0, 14.0], [20.0, 24.0, 90.0]], "losses": [1.0, 2.0, 3.0, 4.0], "likeliest": [1, 2, 3, 4]}


def test_figures_are_those_of_the_tokens():
    results = [
        result("sinkattn fp32", 32, **BASELINE, kv_bytes=2**20, resident_bytes=2**30),
        result("llama.cpp F32", 32, ms=[[8.0, 8.0, 40.0], [20.0, 20.0, 50.0]], losses=[1.0, 2.0, 3.0, 5.0]),
        result("llama.cpp slow", 32, ms=[[80.0], [80.0]]),
        result("llama.cpp Q8_0", 8, ms=[[1.0], [1.0]]),
    ]
    ours, theirs, _, _ = module("report").figures(results)
    assert (ours["median_ms"], ours["worst_ms"]) == (17.0, 52.0)
    # Round by round: 12 / 8 and 24 / 20. The slower one and the one of other bits have no part in it.
    assert ours["to_llama_cpp"] == pytest.approx((1.5 + 1.2) / 2)
    assert theirs["to_llama_cpp"] == 1
    assert ours["perplexity"] == pytest.approx(math.exp(2.5))
    assert (ours["perplexity_to_baseline"], ours["agreement"]) == (None, None)


def test_predictions_are_compared_over_the_same_tokens():
    few = result("recomputation", 32, losses=[None, 2.5, None, 4.0], likeliest=[None, 2, None, 5])
    row = module("report").figures([result("sinkattn fp32", 32, **BASELINE), few])[1]
    assert row["predictions"] == 2
    assert row["perplexity"] == pytest.approx(math.exp(3.25))
    assert row["perplexity_to_baseline"] == pytest.approx(math.exp(0.25))
    assert row["agreement"] == 0.5
    assert "(one in 2)" in module("report").table(content([few]))


def test_table_has_failures_and_the_target():
    report = module("report")
    results = [
        result("sinkattn fp32", 32, **BASELINE),
        result("sinkattn bf16", 16, ms=[[5.0], [5.0]]),
        result("llama.cpp F32", 32, ms=[[10.0], [10.0]]),
        result("llama.cpp BF16", 16, ms=[[4.0], [4.0]]),
        result("attention_sinks fp32", 32, error="installation failed: ERROR: none found"),
    ]
    lines = report.table(json.loads(json.dumps(content(results)))).splitlines()
    assert "attention_sinks fp32: failed: installation failed: ERROR: none found" in lines
    assert any(line.startswith("| attention_sinks fp32 |") for line in lines)
    assert "MISSED: sinkattn fp32 / llama.cpp at most 1.3: 1.80" in lines
    assert "met: sinkattn bf16 / llama.cpp at most 1.3: 1.25" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


class FakeProcess:
    def __init__(self, peer, log: list, fails: str | None = None) -> None:
        self.peer, self.log, self.fails, self.versions = peer, log, fails, {"package": "1"}

    def ask(self, request: dict) -> dict:
        (kind,) = {"time", "score"} & request.keys()
        self.log.append((kind, self.peer.name))
        if kind == self.fails:
            raise module("process").PeerFailed("RuntimeError: out of something")
        tokens = request[kind]
        return {"ms": [1.0] * tokens, "kv_bytes": 5} if kind == "time" else {"losses": [2.0], "likeliest": [7]}

    def cpu_seconds(self) -> float:
        return 0.0

    def resident_bytes(self) -> int:
        return 9

    def close(self) -> None:
        self.log.append(("close", self.peer.name))


def compare(fails: dict, rounds=2):
    """Compare three fake peers, and what their processes were asked."""
    measure, peers = module("measure"), module("peers")
    log: list = []

    def start(peer):
        if fails.get(peer.name) == "start":
            raise module("environments").EnvironmentFailed("needs Python 3.10 to 3.11, and none was found")
        return FakeProcess(peer, log, fails.get(peer.name))

    comparison = measure.Comparison({peers.Peer(name, "x.py", "folder", 32): 32 for name in "abc"}, start)
    comparison.run(measure.Plan(rounds, 3, 1.0, 1))
    return list(comparison.results.values()), log


def test_peers_take_turns():
    results, log = compare({})
    assert [name for kind, name in log if kind == "time"] == ["a", "b", "c", "b", "c", "a"]
    for each in results:
        assert asdict(each) == {
            **{"name": each.name, "bits": 32, "versions": {"package": "1"}, "ms": [[1.0] * 3] * 2, "kv_bytes": 5},
            **{"resident_bytes": 9, "losses": [2.0], "likeliest": [7], "error": None},
        }


def test_a_peer_that_fails_stops_no_other():
    results, log = compare({"a": "start", "b": "time", "c": "score"})
    assert [each.error for each in results] == [
        "needs Python 3.10 to 3.11, and none was found",
        *["RuntimeError: out of something"] * 2,
    ]
    assert [len(each.ms) for each in results] == [0, 0, 2]
    assert [name for kind, name in log if kind == "close"] == ["b", "c"]


def test_ctrl_c_keeps_what_there_is(monkeypatch):
    def interrupt(self, peer, plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(module("measure").Comparison, "_score", interrupt)
    results, log = compare({})
    assert [len(each.ms) for each in results] == [2, 2, 2]
    assert sorted(name for kind, name in log if kind == "close") == ["a", "b", "c"]


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from runner import serve

class Fake:
    packages = ("pip",)
    def __init__(self, job): print("noise"); self.job = job
    def time(self, tokens, seconds): return [1.5] * tokens
    def kv_bytes(self): return self.job["kv"]
    def score(self, tokens): raise ValueError("no text\\nsecond line")

{serve}
"""


def start(folder: Path, serve: str):
    process = module("process")
    (folder / "fake.py").write_text(SCRIPT.format(folder=str(FOLDER), serve=serve))
    peer = module("peers").Peer("fake", str(folder / "fake.py"), "folder", 32)
    return process.PeerProcess(Path(sys.executable), peer, {"kv": 3}, folder / "fake.log")


def test_runner_answers_its_process(tmp_path):
    running = start(tmp_path, "serve(Fake)")
    try:
        assert list(running.versions) == ["pip"]
        assert running.ask({"time": 2, "seconds": 1}) == {"ms": [1.5, 1.5], "kv_bytes": 3}
        assert running.resident_bytes() > 2**20
        with pytest.raises(module("process").PeerFailed, match=r"^ValueError: no text$"):
            running.ask({"score": 2})
    finally:
        running.close()
    assert "noise" in (tmp_path / "fake.log").read_text()


def test_runner_that_dies_is_told_in_one_line(tmp_path):
    with pytest.raises(module("process").PeerFailed, match=r"^ended with status 1: ModuleNotFoundError: No module"):
        start(tmp_path, "import no_such_module")


def test_steps_are_timed_within_both_limits():
    runner = module("runner")
    fed = []

    def step(token: int) -> int:
        fed.append(token)
        time.sleep(0.002)
        return token + 1

    ms, token = runner.time_steps(step, 0, 3, 60.0)
    assert fed == list(range(runner.WARM_UP + 3))
    assert (len(ms), token) == (3, runner.WARM_UP + 3)
    assert min(ms) >= 2
    assert len(runner.time_steps(step, 0, 1000, 0.05)[0]) <= 25


def job(cache: int, tokens: int, **options) -> dict:
    ids = torch.arange(cache - 16 + tokens).remainder(200).tolist()
    return {
        **{"model": str(DEMO_MODEL), "ids": ids, "prompt": cache - 16, "sinks": 4, "cache": cache, "dtype": "float32"},
        **{"threads": torch.get_num_threads(), "options": options},
    }


def test_peers_on_torch_predict_the_same_while_nothing_is_evicted():
    streamed = module("run_sinkattn").Streamed(job(128, 16, quantize=None, compile=False))
    losses, likeliest = streamed.score(16)
    for name, method in module("run_transformers").METHODS.items():
        if name != "kept":
            others, tokens = method(job(128, 16)).score(16)
            assert others == pytest.approx(losses, abs=1e-4)
            assert tokens == likeliest


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_sinkattn_quantizes_its_weights(quantize):
    dense, quantized = (
        module("run_sinkattn").Streamed({**job(64, 1, quantize=each, compile=False), "dtype": "bfloat16"})
        for each in (None, quantize)
    )
    assert weight_bytes(quantized.model) < 0.9 * weight_bytes(dense.model)


def test_sinkattn_in_chunks_predicts_as_token_by_token():
    streamed = module("run_sinkattn").Streamed(job(64, 100, quantize=None, compile=False))
    in_chunks = streamed.score(100)[0]
    streamed.chunk = 1
    assert streamed.score(100)[0] == pytest.approx(in_chunks, abs=1e-4)
    # Behind the cache a dense model sees more, so this comparison can fail.
    assert module("run_transformers").Growing(job(64, 100)).score(100)[0] != pytest.approx(in_chunks, abs=1e-2)


def test_caches_hold_what_their_names_say():
    kept, growing = (module("run_transformers").METHODS[name](job(64, 1)) for name in ("kept", "growing"))
    streamed = module("run_sinkattn").Streamed(job(64, 1, quantize=None, compile=False))
    for peer in (kept, growing, streamed):
        assert len(peer.time(20, 60)) == 20
        assert len(peer.time(20, 60)) == 20
    assert kept.cache.get_seq_length() == 64
    # Prompt, and in two turns the warm-up and 20 tokens.
    assert growing.cache.get_seq_length() == 48 + 2 * (module("runner").WARM_UP + 20)
    assert streamed.kv_bytes() == pytest.approx(kept.kv_bytes(), rel=0.01)


class FakeServer:
    events: list = []  # noqa: RUF012

    def __init__(self, params) -> None:
        pass

    def handle_completions(self, request, receive):
        self.request = request
        # As in the real one, what the callback raises is lost.
        with suppress(Exception):
            any(map(receive, self.events))


@pytest.fixture
def llama_cpp(monkeypatch):
    """The runner of llama.cpp, whose server sends what is put into ``FakeServer.events``."""
    nested = types.SimpleNamespace
    fake = types.ModuleType("xllamacpp")
    fake.ggml_type = nested(GGML_TYPE_F16=1, GGML_TYPE_F32=0)
    fake.CommonParams = lambda: nested(model=nested(), cpuparams=nested(), cpuparams_batch=nested())
    fake.Server = FakeServer
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    monkeypatch.delitem(sys.modules, "run_llama_cpp", raising=False)
    runner = module("run_llama_cpp").LlamaCpp({**job(64, 3, kv="float16"), "kv_elements": 10})
    runner._ids[runner._prompt :] = [50, 51, 52]
    yield runner
    sys.modules.pop("run_llama_cpp", None)


def event(text="x", token=None, top=None, logprob=-1.0) -> dict:
    logprobs = token and {"content": [{"id": token, "logprob": logprob, "top_logprobs": [{"id": top}]}]}
    return {"choices": [{"text": text, "logprobs": logprobs, "finish_reason": None}]}


LAST = {"choices": [{"text": "", "logprobs": None, "finish_reason": "length"}]}


def test_llama_cpp_is_timed_from_token_to_token(llama_cpp, monkeypatch):
    warm_up = module("runner").WARM_UP
    # A character of several tokens says nothing about one.
    monkeypatch.setattr(FakeServer, "events", [event() for _ in range(warm_up + 2)] + [event("é"), event(), LAST])
    clock = iter([*range(warm_up), warm_up + 1, warm_up + 3, warm_up + 7, warm_up + 15])
    monkeypatch.setattr(module("run_llama_cpp").time, "perf_counter", lambda: next(clock))
    assert llama_cpp.time(20, 1000) == [2000, 2000, 8000]
    assert llama_cpp.kv_bytes() == 10 * 64 * 2


def test_llama_cpp_predicts_the_text_through_a_grammar(llama_cpp, monkeypatch):
    monkeypatch.setattr(FakeServer, "events", [event(token=50, top=9, logprob=-2.0), event(token=52, top=52), LAST])
    assert llama_cpp.score(3) == ([2.0, None, 1.0], [9, None, 52])
    assert llama_cpp._server.request["grammar"] == "root ::= <[50]> <[51]> <[52]>"
    assert llama_cpp._server.request["prompt"] == llama_cpp._ids[:48]


def test_llama_cpp_reports_its_errors(llama_cpp, monkeypatch):
    monkeypatch.setattr(FakeServer, "events", [{"error": {"message": "request exceeds the context"}}])
    with pytest.raises(RuntimeError, match="request exceeds the context"):
        llama_cpp.score(3)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A GGUF with a matrix of 8 bits and a norm."""
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    wanted = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("matrix", gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.add_tensor("norm", values[0])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return {"matrix": gguf.quants.dequantize(gguf.quants.quantize(values, wanted), wanted), "norm": values[0]}


def test_other_files_have_the_same_weights(tmp_path):
    expected = write_gguf(tmp_path / "given.gguf")
    weights = module("weights").Weights(tmp_path / "given.gguf", tmp_path / "cache")
    assert weights.path("given") == tmp_path / "given.gguf"
    assert weights.bits() == 8
    for kind, error in {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1e-6}.items():
        path = weights.path(kind)
        before = path.stat().st_mtime_ns
        reader = gguf.GGUFReader(path)
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
        assert reader.fields["general.architecture"].contents() == "llama"
        assert reader.fields["general.file_type"].contents() == module("weights").FILE_TYPES[kind]
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert (tensors["matrix"].tensor_type.name, tensors["norm"].tensor_type.name) == (kind, "F32")
        for name, values in expected.items():
            read = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).reshape(values.shape)
            assert np.abs(read - values).max() <= error * np.abs(values).max()
        assert weights.path(kind).stat().st_mtime_ns == before


def test_the_folder_has_the_same_weights(tmp_path):
    model = build("llama")
    weights = module("weights").Weights(gguf_files.write_gguf(tmp_path / "a.gguf", model, "llama"), tmp_path / "cache")
    loaded = AutoModelForCausalLM.from_pretrained(weights.path("folder"))
    assert loaded.dtype == torch.float32
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected)
    assert AutoTokenizer.from_pretrained(weights.path("folder"))("ab").input_ids[-1:] == [gguf_files.TOKENS.index("ab")]


def test_environments_need_a_python_that_there_is(monkeypatch, tmp_path):
    environments = module("environments")
    assert environments.python_of(None, tmp_path) == Path(sys.executable)
    assert environments.find_python(sys.version_info[:2]) == Path(sys.executable)
    monkeypatch.setattr(environments.sys, "version_info", (3, 99))
    for name in ("PATH", "PYENV_ROOT", "UV_PYTHON_INSTALL_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(environments.EnvironmentFailed, match=r"^needs Python 3.10 to 3.11, and none was found$"):
        environments.python_of("attention_sinks.txt", tmp_path)
    python = tmp_path / "versions" / "3.11.1" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert environments.find_python((3, 11)) == python


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model: expected a GGUF file"),
        (["--model", __file__], "--model: expected a GGUF file (.gguf), got "),
        (["--model", "a.gguf", "--cache", "1000"], "--cache: expected a multiple of 256, got 1000"),
        (["--model", "a.gguf", "--sinks", "600"], "--sinks: expected 0 to 511, got 600"),
        (["--model", "a.gguf", "--rounds", "0"], "--rounds: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench/compare", *arguments])
    # Not as the module __main__, which is pytest's.
    spec = importlib.util.spec_from_file_location("compare_main", FOLDER / "__main__.py")
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    with pytest.raises(SystemExit):
        main.parse_arguments()
    assert f"error: {message}" in capsys.readouterr().err
