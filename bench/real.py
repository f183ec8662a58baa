"""Evaluates a pretrained model with the commands of sinkattn, beside the paper's figures.

    make real                               # says first how long it takes; into docs/evaluation/real-quick
    make real ARGS="--full"                 # as long streams as the paper's, hours; into docs/evaluation/real
    make real ARGS="--full --text FILE"     # on a text of yours; default: the help topics of Python, English prose
    make real ARGS="--only endless latency" # some steps; --again runs them although they are finished

Each step is a command that can be run by itself. It leaves NAME.json, NAME.txt and NAME.png, and README.md shows all
of them. A step that is finished is not run again, so what was interrupted goes on where it was.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import real_model
import real_page

ROOT = Path(__file__).parents[1]
EVALUATION = ROOT / "docs" / "evaluation"
# Facts that a small model knows, in its own words.
QUESTIONS = ROOT / "bench" / "capitals.jsonl"


@dataclass(frozen=True)
class Step:
    """One command, which takes --json FILE."""

    name: str
    minutes: float
    """About how long it takes on two idle cores."""
    arguments: list[str]
    """Those of sinkattn, or of a script here: the first one then ends in .py."""

    @property
    def command(self) -> list[str]:
        """The command without its output files."""
        if self.arguments[0].endswith(".py"):
            return [sys.executable, str(Path(__file__).with_name(self.arguments[0])), *self.arguments[1:]]
        return [sys.executable, "-m", "sinkattn", *self.arguments]

    @property
    def shown(self) -> str:
        """The command as the page shows it."""
        first, *rest = (Path(each).name if "/" in each else each for each in self.arguments)
        return " ".join([f"python bench/{first}" if first.endswith(".py") else f"sinkattn {first}", *rest])


def steps(model: str, text: Path, full: bool) -> list[Step]:
    """The steps of an evaluation, those that matter most first."""
    of, on = ["--model", model], ["--text", str(text)]

    def caches(total: int) -> list[str]:
        return ["--cache", *(f"{sinks}+{total - sinks}" for sinks in (0, 1, 2, 4, 8))]

    def ppl(total: int, tokens: int, dense: int, every: int) -> list[str]:
        sizes = ["--tokens", str(tokens), "--dense-tokens", str(dense), "--recompute-every", str(every)]
        return ["eval", "ppl", *of, *on, *caches(total), *sizes]

    def talk(rounds: int) -> list[str]:
        return ["eval", "chat", *of, "--compile", "--cache", "0+512", "4+508", "--rounds", str(rounds)]

    def agreement(tokens: int) -> list[str]:
        return ["real_agreement.py", *of, *on, "--cache", "4+252", "--tokens", str(tokens)]

    def learning(tokens: int) -> list[str]:
        sizes = ["--tokens", str(tokens), "--cache", "4+252", "--variants", "lora", "all"]
        return ["eval", "learn", *of, "--dtype", "float32", *on, *sizes]

    chat = ["--chat", *of, "--cache", "0+1024", "4+1020"]
    lines = ["eval", "streameval", "--no-recompute", *chat]
    answers = ["eval", "stream-qa", "--chat", *of, "--questions", str(QUESTIONS), "--cache", "0+512", "4+508"]
    if full:
        usual = ["--minutes", "1000"]  # the usual sizes, however slow the model is
        half = ["--dtype", "bfloat16"]
        return [
            Step("ppl-256", 8, [*ppl(256, 100_000, 12_000, 128), *half]),
            Step("ppl-1024", 10, [*ppl(1024, 100_000, 12_000, 256), *half]),
            Step("sinks", 8, ["eval", "sinks", *of, *on, *usual]),
            Step("agreement", 5, agreement(20_000)),
            Step("endless", 10, ["eval", "endless", *of, *on, "--tokens", "200000", "--cache", "4+1020", *half]),
            Step("latency", 4, ["eval", "latency", *of, *usual]),
            Step("streameval", 10, [*lines, "--distances", "5", "20", "40", "100", "200", *usual]),
            Step("stream-qa", 1, answers),
            Step("chat", 8, [*talk(100), *half]),
            Step("learn", 12, learning(30_000)),
        ]
    short = ["--sizes", "128", "256", "--lengths", "500", "1000", "2000", "--rounds", "5"]
    return [
        Step("ppl-256", 2, ppl(256, 6_000, 3_000, 128)),
        Step("sinks", 1, ["eval", "sinks", *of, *on, "--size", "256", "--tokens", "1000"]),
        Step("agreement", 3, agreement(8_000)),
        Step("endless", 1, ["eval", "endless", *of, *on, "--tokens", "10000", "--cache", "4+252"]),
        Step("latency", 1, ["eval", "latency", *of, *short]),
        Step("streameval", 1, [*lines, "--distances", "5", "150", "--count", "20"]),
        Step("stream-qa", 1, answers),
        Step("chat", 2, talk(10)),
        Step("learn", 2, learning(4_096)),
    ]


def topics() -> Path:
    """The help topics of Python, as a text file: half a megabyte of English that every Python has."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sys.exit("real: this Python comes without its help topics; give --text FILE")
    path = ROOT / "build" / f"python-{platform.python_version()}-topics.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def run(step: Step, folder: Path, where: Path) -> None:
    """Run a step and leave its files in the folder; exits if it fails. ``where``: the folder that it runs in."""
    unfinished = folder / f"{step.name}.unfinished.json"
    command = [*step.command, "--json", str(unfinished)]
    if "eval" in step.arguments:
        command += ["--plot", str(folder / f"{step.name}.png")]
    began = time.time()
    done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        sys.exit(f"real: {step.name} ended with {done.returncode}; it begins anew in the next run")
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("Figures: ", "Picture: "))]
    (folder / f"{step.name}.txt").write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    report = {"command": step.shown, "seconds": round(time.time() - began), **json.loads(unfinished.read_text())}
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(folder / f"{step.name}.json")


def is_finished(step: Step, folder: Path) -> bool:
    """Whether the folder has the figures of exactly this step."""
    path = folder / f"{step.name}.json"
    return path.is_file() and json.loads(path.read_text())["command"] == step.shown


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="real", description="evaluate a pretrained model")
    parser.add_argument("--full", action="store_true", help="long streams: hours")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: the help topics of Python)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run only these steps")
    parser.add_argument("--again", action="store_true", help="run finished steps again")
    args = parser.parse_args(argv)
    if args.text is not None and not args.text.is_file():
        parser.error(f"text: no file at {args.text}")
    names = [step.name for step in steps("", Path(), args.full)]
    if unknown := set(args.only or ()).difference(names):
        parser.error(f"only: expected steps among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model = real_model.fetch()
    text = topics() if args.text is None else args.text.resolve()
    folder = EVALUATION / ("real" if args.full else "real-quick")
    folder.mkdir(parents=True, exist_ok=True)
    every = steps(model.name, text, args.full)
    chosen = [step for step in every if not args.only or step.name in args.only]
    left = [step for step in chosen if args.again or not is_finished(step, folder)]
    minutes = sum(step.minutes for step in left)
    print(f"real: {len(left)} of {len(every)} steps to run, about {minutes:.0f} minutes on two idle cores", flush=True)
    for step in left:
        print(f"\n==> {step.name}, about {step.minutes:.0f} min: {step.shown}", flush=True)
        # In the model's folder, so that figures name the file and no path.
        run(step, folder, model.parent)
        real_page.write(folder, [each.name for each in every])
    print(f"real: figures, tables and pictures are in {real_page.write(folder, [each.name for each in every])}")


if __name__ == "__main__":
    main()
