"""Encoders that meet with accidents, for extractions in tests; each is made in a worker's process."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from msr_dist.llm.encode import Encoded, Encoder, EncoderConfig
from msr_dist.llm.prompts import Prompt
from working import die


class Plain(Encoder):
    """No accident; what the machine can do at best is not measured."""

    def peak(self) -> float:
        return 1e12


class Counting(Plain):
    """Leaves in `folder` how many prompts it was given, a line for each call."""

    def __init__(self, folder: Path, config: EncoderConfig) -> None:
        super().__init__(config)
        self.folder = folder

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        with open(self.folder / "encoded", "a") as file:
            file.write(f"{len(prompts)}\n")
        return super().encode(prompts)


def encoded(folder: Path) -> list[int]:
    """How many prompts each call had so far."""
    file = folder / "encoded"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


class DiesOnce(Counting):
    """One of all processes dies, in its third call."""

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        result = super().encode(prompts)
        marker = self.folder / "died"
        if len(encoded(self.folder)) >= 3 and not marker.exists():
            marker.write_text(str(os.getpid()))
            die()
        return result


class Slow(Counting):
    """Takes its time, so that somebody can come between."""

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        time.sleep(0.2)
        return super().encode(prompts)


class Interrupted(Counting):
    """Somebody presses Ctrl-C at its fourth call."""

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        result = super().encode(prompts)
        if len(encoded(self.folder)) == 4:
            raise KeyboardInterrupt
        return result


class DiesOf(Counting):
    """Every process dies whose prompts say `word` in their own part."""

    def __init__(self, folder: Path, word: str, config: EncoderConfig) -> None:
        super().__init__(folder, config)
        self.word = word

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        result = super().encode(prompts)
        if any(self.word in prompt.text[prompt.own_start :] for prompt in prompts):
            self.end()
        return result

    def end(self) -> None:
        die()


class FailsAt(DiesOf):
    """The same with an exception that is no user's to mend."""

    def end(self) -> None:
        raise KeyError("a fault of ours")


class FailsAtMany(Counting):
    """Manages one user at a time."""

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        if len(prompts) > 1 and not any("interactions" in prompt.text for prompt in prompts):
            raise MemoryError("too many at once")
        return super().encode(prompts)
