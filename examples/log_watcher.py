"""Watch a log for ever, and print the lines that surprise the model: those that are unlike the lines before them.

    tail -n 1000 -F app.log | python examples/log_watcher.py
    python examples/log_watcher.py --model HuggingFaceTB/SmolLM2-135M < app.log

A line is surprising if its loss lies far above that of the usual line. To ask a model about lines with a pattern, see
`sinkattn generate --follow`; `sinkattn.OnlineLearner` learns from the log what is usual.
"""

import argparse
import statistics
import sys
from collections import deque

import torch
from torch.nn.functional import cross_entropy

import sinkattn
from sinkattn.hf.load import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a path (default: the small one that ships with sinkattn)")
    parser.add_argument("--far", type=float, default=4.0, help="standard deviations above the mean loss of a line")
    parser.add_argument("--warm-up", type=int, default=50, help="lines to read first")
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    sinkattn.enable(model, num_sinks=4)
    cache = sinkattn.SinkCache(model)
    usual: deque[float] = deque(maxlen=1000)
    last = tokenizer("\n", add_special_tokens=False, return_tensors="pt").input_ids[:, -1:]
    for line in sys.stdin:
        new = tokenizer(line, add_special_tokens=False, truncation=True, max_length=512, return_tensors="pt").input_ids
        ids = torch.cat([last, new], dim=1).to(model.device)
        with torch.no_grad():  # each token is fed once, and predicts the next one
            logits = model(ids[:, :-1], cache=cache).logits
        loss = cross_entropy(logits[0].float(), ids[0, 1:]).item()  # nats per token
        last = new[:, -1:]
        if len(usual) >= args.warm_up and loss > statistics.mean(usual) + args.far * statistics.stdev(usual):
            print(f"{loss:.2f}  {line}", end="", flush=True)
        usual.append(loss)


if __name__ == "__main__":
    main()
