"""What importing the package needs, and which of its files may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sinkattn"
FILES = sorted(PACKAGE.rglob("*.py"))
# From bottom to top: a file imports only from further down. Every other file stands above them all.
LAYERS = [
    {"argument_checks"},
    {"rope", "attention_arguments"},
    {"reference", "kernels"},
    {"ops"},
    {"ring_cache"},
    {"hf"},
    {"evaluate"},
    {"serve"},
    {"cli"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
# The same within `sinkattn.hf`.
HF_LAYERS = [
    {"versions", "dry_run", "plain_tensors"},
    {"unsupported"},
    {"model_config", "ranks"},
    {"probe"},
    {"adapters", "model_patch"},
    {"fingerprint"},
    {"cache"},
    {"inputs", "sampling"},
    {"generation"},
    {"swap"},
    {"trial", "stream", "tokenize_stream", "load", "forward_gate"},
    {"reencode", "learner", "pool"},
    {"background", "follow", "chat"},
    {"api"},
    {"__init__"},
]
HF_HEIGHT = {name: height for height, names in enumerate(HF_LAYERS) for name in names}


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_works_without_transformers_and_triton():
    result = run_python(
        "import sys\n"
        "sys.modules['transformers'] = sys.modules['triton'] = None\n"
        "import sinkattn, torch\n"
        "ring = sinkattn.RingKVCache(1, 1, 2, num_sinks=1, window=2)\n"
        "one = torch.ones(1, 1, 1, 2)\n"
        "assert torch.equal(sinkattn.sink_attention(one, one, one, ring), one)\n"
        "try:\n"
        "    sinkattn.enable\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "transformers" in result.stdout


def loaded_by(code: str, *, after: str = "") -> set[str]:
    """The modules, other than those of the standard library, that ``code`` loads when it runs after other code."""
    names = "{name for name in sys.modules if name.partition('.')[0] not in sys.stdlib_module_names}"
    result = run_python(f"import sys\n{after}\nbefore = {names}\n{code}\nprint(*({names} - before), sep='\\n')")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines())


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_a_name_loads_what_it_needs_and_no_more():
    assert loaded_by("import sinkattn") == {"sinkattn"}
    loaded = loaded_by("import sinkattn; sinkattn.RingKVCache")
    assert {"torch", "sinkattn.ops"} <= loaded
    assert not packages(loaded) & {"transformers", "triton"}


def test_usage_needs_only_the_standard_library():
    code = (
        "import contextlib, io\n"
        "from sinkattn.cli import main\n"
        "for words in ('--version', '--help', 'info --help', 'eval ppl --help'):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:\n"
        "        main(words.split())\n"
        "assert '--recompute-every' in printed.getvalue()\n"
    )
    assert packages(loaded_by(code)) == {"sinkattn"}


def test_generate_loads_nothing_that_its_model_does_not_need():
    """Compilers, quantization, adapters, measurements: each would take up to a second."""
    model = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n" + "\n".join(
        f"{name}.from_pretrained('sinkattn/demo_model')" for name in "MT"
    )
    words = ["generate", "--prompt", "def f(x):", "--max-new-tokens", "2"]
    code = f"import io\nfrom sinkattn.cli import main\nout, sys.stdout = sys.stdout, io.StringIO()\nmain({words})\n"
    loaded = loaded_by(code + "sys.stdout = out", after=model)
    assert "sinkattn.hf.swap.ring_patch" in loaded
    assert packages(loaded) <= {"sinkattn", "transformers"}
    assert not {name for name in loaded if name.startswith("sinkattn.kernels")}


def test_every_name_is_there_and_listed():
    import sinkattn

    every = {*sinkattn.__all__, "evaluate", "hf", "ops", "reference"}
    assert every <= set(dir(sinkattn))
    assert {name for name in every if getattr(sinkattn, name, None) is None} == set()
    from sinkattn.hf.pool.pool import StreamPool

    assert vars(sinkattn)["StreamPool"] is sinkattn.StreamPool is StreamPool


def test_unknown_attribute_is_refused():
    import sinkattn

    with pytest.raises(AttributeError, match="module 'sinkattn' has no attribute 'Ring'"):
        sinkattn.Ring  # noqa: B018


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it runs, in full; what only type checkers read does not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [path for path in FILES if layer_of(path) in HEIGHT], ids=layer_of)
def test_imports_go_one_way(path):
    imports, layer = imports_of(path), layer_of(path)
    ours = {name.split(".")[1] for name in imports if name.startswith("sinkattn.")} - {layer, "_C"}
    assert not {name for name in ours if HEIGHT.get(name, len(LAYERS)) >= HEIGHT[layer]}
    if HEIGHT[layer] < HEIGHT["hf"]:
        assert "transformers" not in packages(imports)


def test_measurements_leave_arguments_tables_and_pictures_to_the_command_line():
    for path in (PACKAGE / "evaluate").rglob("*.py"):
        assert not packages(imports_of(path)) & {"argparse", "matplotlib", "psutil", "rich"}, path


def test_imports_within_hf_go_one_way():
    wrong = {}
    for path in (PACKAGE / "hf").rglob("*.py"):
        part = path.relative_to(PACKAGE / "hf").with_suffix("").parts[0]
        ours = {name.split(".")[2] for name in imports_of(path) if name.startswith("sinkattn.hf.")} - {part}
        if above := {name for name in ours & HF_HEIGHT.keys() if HF_HEIGHT[name] >= HF_HEIGHT[part]}:
            wrong[str(path)] = above
    assert not wrong


def names_compiled_code(path: Path) -> bool:
    """Whether a file imports the compiled module or uses ``torch.ops`` for more than PyTorch's own operators."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    uses = sum(ast.unparse(node) == "torch.ops" for node in nodes)
    of_pytorch = sum(ast.unparse(node) == "torch.ops.aten" for node in nodes)
    return uses > of_pytorch or bool({"sinkattn._C", "torch.ops"} & imports_of(path))


def test_only_ops_names_compiled_code():
    assert {layer_of(path) for path in FILES if names_compiled_code(path)} == {"ops"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Which modules of the package each of them names in an import, also for type checkers only, or in a function."""
    modules = {module_of(path): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # `from package import module` needs the module; `from package import name` the package.
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else node.module for name in named}
        graph[module] = (names & modules.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that lead back to themselves."""
    reached = {module: set(imported) for module, imported in graph.items()}
    for _ in graph:
        reached = {module: those.union(*(reached[each] for each in those)) for module, those in reached.items()}
    return {module for module, those in reached.items() if module in those}


def test_no_circle_of_imports():
    graph = import_graph()
    # The root looks up its lazy names in `sinkattn.hf`, and defines nothing that another module imports but its name.
    assert circles({module: those - {"sinkattn"} for module, those in graph.items()}) == set()


def test_a_circle_of_imports_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
