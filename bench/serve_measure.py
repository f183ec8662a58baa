"""The measurements of `bench_serve.py`: servers in turns, round after round, and late turns of a chat."""

import asyncio
import copy
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_client import Chat, Reply, WrongAnswer
from serve_peer import Peer, agreement
from serve_process import Kind, OtherWork, Server, sinkattn_serve, transformers_serve, transformers_serve_batching
from serve_report import late_row, load_rows
from transformers import PreTrainedTokenizerBase

# Seconds before a turn of a chat that is measured, in which somebody reads the last reply, and its end runs.
PAUSE = 0.5


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        threads: of each server.
        window: of sinkattn, in tokens; None for one that holds all that chats will have.
        history: tokens before the first turn.
        new_tokens: of a reply.
        rounds: of later turns.
        requests: least ones of a server in a round.
        seconds: for one number of sessions. No other round begins that would last longer, and no server has more than
            its share of it in one round.
        least_equal: share of tokens that servers which see the same must have in common.
    """

    threads: int
    window: int | None
    history: int
    new_tokens: int
    rounds: int
    requests: int
    seconds: float
    least_equal: float


class Benchmark:
    """The measurements.

    Args:
        plan: how much is measured.
        folder: with the model; logs go there, too.
        tokenizer: of the model.
        words: that it says.
    """

    def __init__(self, plan: Plan, folder: Path, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
        self._plan, self._folder, self._tokenizer, self._words = plan, folder, tokenizer, words

    async def load(self, count: int) -> list[dict[str, Any]]:
        """Measure so many sessions; raises ServerFailed or WrongAnswer."""
        plan, end, other_work = self._plan, time.monotonic() + self._plan.seconds, OtherWork()
        turns = -(-plan.requests // count)
        chats = [self._chat(Chat, seed) for seed in range(count)]
        for chat in chats:
            chat.grow(plan.history, self._count)
        needed = max(self._count_after(chat, 1 + plan.rounds * turns) for chat in chats)
        window = plan.window or needed
        kinds = (
            sinkattn_serve(self._folder, streams=count + 1, window=window),
            transformers_serve(self._folder),
            # A quarter more, as not all blocks are full.
            transformers_serve_batching(self._folder, tokens=(count + 1) * needed * 5 // 4),
        )
        with ExitStack() as stack:
            peers = [Peer(server, copy.deepcopy(chats)) for server in self._start(stack, *kinds)]
            for peer in peers:
                await peer.warm_up(self._chat(Chat, count))

            async def take_turns(chosen: list[Peer], turns: int) -> float:
                begin = time.monotonic()
                with other_work.counted([peer.server for peer in peers]):
                    for peer in chosen:
                        say(f"  {peer.server.kind.name}: {await peer.burst(turns, plan.seconds / len(peers))}")
                if window >= needed:
                    self._check(peers)
                return time.monotonic() - begin

            say(f"{count} sessions: first turn")
            await take_turns([peer for peer in peers if peer.server.kind.keeps], 1)
            lasted = 0.0
            for number in range(plan.rounds):
                if number and time.monotonic() + lasted > end:
                    say("out of time for another round")
                    break
                say(f"{count} sessions: round {number + 1} of {plan.rounds}")
                # The order changes, so that none always runs after the same one.
                running = [peer for peer in peers if peer.error is None]
                first = number % max(1, len(running))
                lasted = await take_turns(running[first:] + running[:first], turns)
        return load_rows(count, peers, other_work.percent)

    async def late(self, chat_type: type[Chat], turn: int, samples: int) -> dict[str, Any]:
        """Measure so many turns of a chat around a late one, and second turns of as many others.

        Raises ServerFailed or WrongAnswer.
        """
        other_work, late, second = OtherWork(), list[Reply](), list[Reply]()
        say(f"turn {turn}, {chat_type.sends}")
        with ExitStack() as stack:
            (server,) = self._start(stack, sinkattn_serve(self._folder, streams=3))
            async with server.client() as http:
                chat = self._chat(chat_type, 0)
                for _ in range(turn - samples // 2):
                    await chat.turn(http)
                with other_work.counted([server]):
                    for sample in range(samples):
                        await asyncio.sleep(PAUSE)
                        late.append(await chat.turn(http))
                        other = self._chat(chat_type, 1 + sample)
                        await other.turn(http)
                        await asyncio.sleep(PAUSE)
                        second.append(await other.turn(http))
                        await other.forget(http)
        return late_row(chat_type.sends, turn, late, second, other_work.percent)

    def _start(self, stack: ExitStack, *kinds: Kind) -> list[Server]:
        """Start servers side by side, and wait until they are ready."""
        servers = [
            stack.enter_context(Server(kind, self._plan.threads, self._folder / f"{number}.log"))
            for number, kind in enumerate(kinds)
        ]
        for server in servers:
            server.wait()
        return servers

    def _chat(self, chat_type: type[Chat], seed: int) -> Chat:
        return chat_type(str(self._folder), self._words, seed, self._plan.new_tokens)

    def _count(self, messages: list[dict[str, str]]) -> int:
        return len(self._tokenizer.apply_chat_template(messages, return_dict=False))

    def _count_after(self, chat: Chat, turns: int) -> int:
        """Tokens that a chat will have after so many turns."""
        grown = copy.deepcopy(chat)
        for _ in range(turns):
            reply = {"role": "assistant", "content": self._plan.new_tokens * self._words[0]}
            grown.messages += [grown.question(), reply]
        return self._count(grown.messages)

    def _check(self, peers: list[Peer]) -> None:
        """Raise WrongAnswer unless servers that see the same say the same."""
        ours, *others = peers
        for theirs in others:
            found = agreement(ours.chats, theirs.chats)
            names = f"{ours.server.kind.name} and {theirs.server.kind.name}"
            if found.lengths is not None:
                raise WrongAnswer(f"{names}: expected messages of as many tokens, got {found.lengths}")
            if found.share < self._plan.least_equal:
                raise WrongAnswer(f"{names}: expected the same tokens, got {found.share:.0%} of {found.tokens}")


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)
