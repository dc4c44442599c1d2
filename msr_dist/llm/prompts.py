"""Prompts: one text for each scenario and one for each user, from templates that a user may replace.

    templates = Templates.load(PromptConfig())
    prompts = scenario_prompts(schema, histories.statistics, templates)
    prompt = user_prompt(history, schema.scenarios, templates, config, encoder.count)

A template is a text with placeholders in braces; `{{` and `}}` stand for braces themselves:

    {number}      how many scenarios there are
    {scenarios}   a line for each scenario: its name and description, in scenario prompts its statistics too
    {user}        the user's own part: who it is, and a line for each scenario with what was chosen there
    {scenario}    the own part of a scenario: its name, description and statistics

The own part ends the template, so that all prompts of a kind begin alike and the beginning is computed once. The
templates' wording is ours: what LLM4MSR's prompts ask is known, their words are not.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Self

from pydantic import Field

from msr_dist.config import Config
from msr_dist.llm.history import History, ScenarioStatistics
from msr_dist.schema import FeatureSchema, Scenario

EARLIER = "earlier, anywhere"
"""Names, in place of a scenario, what a user chose before the log begins."""
LAYOUT = 1
"""Counts up when the same template and values give another text."""


class PromptConfig(Config):
    """Which templates are filled, and how long a prompt may become."""

    scenario_template: Path | None = None
    """A file to use in place of the package's own templates/scenario.txt."""
    user_template: Path | None = None
    """A file to use in place of the package's own templates/user.txt."""
    user_tokens: int = Field(default=512, ge=1)
    """The longest user prompt, in tokens of the model. What is beyond is left out: of every scenario the oldest events,
    and where one event of each is too much, the scenarios with the fewest."""


@dataclass(frozen=True)
class Prompt:
    """What a language model reads."""

    text: str
    own_start: int
    """Where the user's (or scenario's) own part begins, in characters; all prompts of a kind are equal before it."""


class PromptError(ValueError):
    """A user for whom there is no prompt; its text is the reason."""


@dataclass(frozen=True)
class Template:
    """A text with placeholders, the last of which is the own part."""

    parts: tuple[tuple[str, str | None], ...]
    """Plain text, and the placeholder that follows it."""

    @classmethod
    def parse(cls, text: str, own: str, where: str) -> Self:
        """Take `text` apart; ValueError that opens with `where` unless its placeholders are right and `own` ends it."""
        try:
            parsed = list(Formatter().parse(text.rstrip()))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; write {{{{ or }}}} where a brace itself is meant") from None
        known, found = ("number", "scenarios", own), [name for _, name, *_ in parsed if name is not None]
        for _, name, formatting, conversion in parsed:
            if name is not None and (name not in known or formatting or conversion):
                written = name + (f"!{conversion}" if conversion else "") + (f":{formatting}" if formatting else "")
                raise ValueError(f"{where}: unknown placeholder {{{written}}}; there are {_braced(known)}")
        if "scenarios" not in found:
            raise ValueError(f"{where}: the placeholder {{scenarios}} is missing: it names and describes the scenarios")
        if found.count(own) != 1 or parsed[-1][1] != own:
            raise ValueError(f"{where}: the placeholder {{{own}}} has to stand once, at the very end")
        return cls(tuple((plain, name) for plain, name, *_ in parsed))

    def shared(self, values: Mapping[str, str]) -> str:
        """Everything before the own part; what stands in `values` is taken literally."""
        filled = [plain + ("" if name is None else values[name]) for plain, name in self.parts[:-1]]
        return "".join(filled) + self.parts[-1][0]


@dataclass(frozen=True)
class Templates:
    """The two templates."""

    scenario: Template
    user: Template
    digest: str
    """The version of both texts and of how they are filled, in hexadecimal digits."""

    @classmethod
    def load(cls, config: PromptConfig) -> Self:
        """Read and check the files of `config`, or the package's own; ValueError names file and placeholder."""
        texts = [
            _read(config.scenario_template, "scenario.txt", "prompts.scenario_template"),
            _read(config.user_template, "user.txt", "prompts.user_template"),
        ]
        # Lengths keep the border between the two; the blanks at their ends are never used.
        version = "".join(f"{len(text.rstrip())}:{text.rstrip()}" for _, text in texts)
        return cls(
            scenario=Template.parse(texts[0][1], "scenario", texts[0][0]),
            user=Template.parse(texts[1][1], "user", texts[1][0]),
            digest=hashlib.blake2b(f"{LAYOUT}:{version}".encode(), digest_size=16).hexdigest(),
        )


def scenario_prompts(
    schema: FeatureSchema, statistics: Sequence[ScenarioStatistics], templates: Templates
) -> list[Prompt]:
    """One for each scenario, which is set against all others; `statistics` has one entry per scenario."""
    lines = [
        f"{_described(scenario)} ({counts.interactions:,} interactions, {counts.users:,} users, {counts.items:,} items)"
        for scenario, counts in zip(schema.scenarios, statistics, strict=True)
    ]
    shared = templates.scenario.shared(_shared_values(lines))
    return [Prompt(shared + line, len(shared)) for line in lines]


def user_prompt(
    history: History,
    scenarios: Sequence[Scenario],
    templates: Templates,
    config: PromptConfig,
    count: Callable[[str], int],
) -> Prompt:
    """What the user engaged with, scenario by scenario, in at most `config.user_tokens` tokens as `count` gives them.

    Of every scenario the same number of newest events stands there: as many as fit. Where one of each does not, it is
    one of as many scenarios as fit, those with the most events first. The scenarios' statistics do not stand there, so
    that new rows change the prompts of their users alone.

    Raises:
        PromptError: there are no events, or not even one fits.
    """
    if not history.texts:
        raise PromptError("no events before the cut-off")
    chosen: dict[int, list[str]] = defaultdict(list)
    for scenario, text in zip(history.scenarios, history.texts, strict=True):
        chosen[scenario].append(text)
    shared = templates.user.shared(_shared_values([_described(scenario) for scenario in scenarios]))

    def name_of(scenario: int) -> str:
        return _line(scenarios[scenario].name) if scenario < len(scenarios) else EARLIER

    def text_with(most: int, kept: Collection[int]) -> str:
        lines = [f"{name_of(each)}: {'; '.join(texts[:most])}" for each, texts in chosen.items() if each in kept]
        return shared + "\n".join([history.about, *lines] if history.about else lines)

    def tokens_with(most: int, kept: Collection[int]) -> int:
        return count(text_with(most, kept))

    longest = max(map(len, chosen.values()))
    if tokens_with(longest, chosen) <= config.user_tokens:
        return Prompt(text_with(longest, chosen), len(shared))
    events = bisect_right(range(1, longest), config.user_tokens, key=lambda most: tokens_with(most, chosen))
    if events:
        return Prompt(text_with(events, chosen), len(shared))
    ranked = sorted(chosen, key=lambda each: -len(chosen[each]))
    scenarios_kept = bisect_right(
        range(1, len(ranked)), config.user_tokens, key=lambda most: tokens_with(1, ranked[:most])
    )
    if scenarios_kept:
        return Prompt(text_with(1, ranked[:scenarios_kept]), len(shared))
    least = tokens_with(1, ranked[:1])
    raise PromptError(f"{least} tokens with one event alone, but prompts.user_tokens is {config.user_tokens}")


def _shared_values(lines: Sequence[str]) -> dict[str, str]:
    return {"number": str(len(lines)), "scenarios": "\n".join(f"- {line}" for line in lines)}


def _described(scenario: Scenario) -> str:
    return _line(f"{scenario.name}: {scenario.text}" if scenario.text else scenario.name)


def _line(text: str) -> str:
    """`text` in one line."""
    return " ".join(text.split())


def _braced(names: Sequence[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def _read(given: Path | None, own: str, key: str) -> tuple[str, str]:
    """(where, text) of the template that is given, or else of the package's own."""
    if given is None:
        return own, (resources.files("msr_dist.llm") / "templates" / own).read_text(encoding="utf-8")
    try:
        return f"{given} ({key})", given.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{given} ({key}): cannot be read ({error}); give a text file in UTF-8") from None
