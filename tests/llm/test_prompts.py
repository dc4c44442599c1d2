import pytest

import texts
from msr_dist.llm.history import History, ScenarioStatistics
from msr_dist.llm.prompts import Prompt, PromptConfig, PromptError, Templates, scenario_prompts, user_prompt
from msr_dist.schema import Scenario

OWN = PromptConfig()
SCENARIOS = texts.schema().scenarios
STATISTICS = tuple(ScenarioStatistics(interactions=n * 1000, users=n, items=n) for n in (1, 2, 3))


def history(*events, about="", row=1):
    return History(row, 100 + row, about, [each[0] for each in events], [each[1] for each in events])


def words(text):
    return len(text.split())


def prompt(of, config=OWN, count=words, templates=None, scenarios=SCENARIOS):
    return user_prompt(of, scenarios, templates or Templates.load(config), config, count)


def templates_from(tmp_path, user=None, scenario=None):
    given = {}
    for name, text in (("user", user), ("scenario", scenario)):
        if text is not None:
            given[f"{name}_template"] = tmp_path / f"{name}.txt"
            given[f"{name}_template"].write_text(text, encoding="utf-8")
    return Templates.load(PromptConfig(**given))


def test_a_user_prompt_ends_in_the_users_own_part():
    found = prompt(history((0, "Bread at Home"), (0, "Ten Soups"), (2, "Deep Time"), about="age: 18-24"))
    assert found.text[found.own_start :] == "age: 18-24\nhome: Bread at Home; Ten Soups\ntonight: Deep Time"
    shared = found.text[: found.own_start]
    assert "serves people in 3 scenarios:\n- home: People open the front page and look around.\n- search: " in shared
    assert shared.endswith("alone.\n\n")
    other = prompt(history((1, "Footprints"), row=2))
    assert other.text == shared + "search: Footprints"
    assert other.own_start == found.own_start


def test_scenario_prompts_share_their_beginning_and_compare():
    found = scenario_prompts(texts.schema(), STATISTICS, Templates.load(OWN))
    assert len(found) == 3
    shared = found[0].text[: found[0].own_start]
    owns = [
        "home: People open the front page and look around. (1,000 interactions, 1 users, 1 items)",
        "search: People type a query and choose among results. (2,000 interactions, 2 users, 2 items)",
        "tonight: People pick something for the same evening. (3,000 interactions, 3 users, 3 items)",
    ]
    assert found == [Prompt(shared + own, len(shared)) for own in owns]
    assert "\n".join(f"- {own}" for own in owns) in shared
    assert "in common" in shared
    assert "sets it apart" in shared


def test_a_scenario_without_text_is_named_by_its_name_alone():
    bare = tuple(Scenario(id=n, name=f"tab{n}") for n in range(2))
    found = prompt(history((1, "item 5")), scenarios=bare)
    assert "2 scenarios:\n- tab0\n- tab1\n\n" in found.text
    assert found.text.endswith("\n\ntab1: item 5")


def test_names_and_descriptions_of_scenarios_stay_in_one_line():
    odd = (Scenario(id=0, name="a\nb {user}", text="c\n\nd {number} $x"),)
    found = prompt(history((0, "item 5")), scenarios=odd)
    assert "\n- a b {user}: c d {number} $x\n\n" in found.text
    assert found.text.endswith("\n\na b {user}: item 5")


def test_the_newest_events_that_fit_stay():
    """Against a plain search over every number of events, with tokens of several lengths."""
    long = history(
        *[(0, f"home number {n}") for n in range(15)],
        *[(1, " ".join(["search"] * (n % 5 + 1))) for n in range(4)],
        *[(2, f"t{n}") for n in range(20)],
    )

    def cut(most):
        kept, seen = [], [0, 0, 0]
        for scenario, text in zip(long.scenarios, long.texts, strict=True):
            if seen[scenario] < most:
                kept.append((scenario, text))
                seen[scenario] += 1
        return prompt(history(*kept), PromptConfig(user_tokens=10**6))

    sizes = [words(cut(most).text) for most in range(1, 21)]
    assert sizes == sorted(set(sizes))
    for tokens in range(sizes[0], sizes[-1] + 2):
        fitting = max(most for most, size in enumerate(sizes, 1) if size <= tokens)
        found = prompt(long, PromptConfig(user_tokens=tokens))
        assert found == cut(fitting)
        assert words(found.text) <= tokens


def test_a_prompt_that_fits_is_counted_once():
    counted = []

    def count(text):
        counted.append(text)
        return 1

    found = prompt(history(*[(0, "x")] * 20), count=count)
    assert counted == [found.text]


def test_no_prompt_without_events():
    with pytest.raises(PromptError, match=r"^no events before the cut-off$"):
        prompt(history(about="age: 18-24"))


def test_scenarios_with_the_most_events_stay_where_one_event_of_each_does_not_fit():
    events = history((0, "a b c"), (1, "e"), (1, "f"), (2, "g"))
    least = words(prompt(history((0, "a b c"), (1, "e"), (2, "g"))).text)
    assert prompt(events, PromptConfig(user_tokens=least)).text.endswith("home: a b c\nsearch: e\ntonight: g")
    # Of scenarios with the same number of events, the first.
    assert prompt(events, PromptConfig(user_tokens=least - 1)).text.endswith("\nhome: a b c\nsearch: e")
    assert prompt(events, PromptConfig(user_tokens=least - 3)).text.endswith("\n\nsearch: e")
    reason = f"^{least - 6} tokens with one event alone, but prompts.user_tokens is {least - 7}$"
    with pytest.raises(PromptError, match=reason):
        prompt(events, PromptConfig(user_tokens=least - 7))


@pytest.mark.parametrize(
    "title",
    ["{user} {scenarios} {number}", "{", "}}", "{0.__class__}", "$user ${user} $", "%s %(user)s", "\"q\" 'q' \\n \\1"],
)
def test_titles_are_taken_literally(title, tmp_path):
    found = prompt(history((1, title), about=title))
    assert found.text[found.own_start :] == f"{title}\nsearch: {title}"
    own = templates_from(tmp_path, user="{scenarios} {user}")
    assert prompt(history((0, title)), templates=own).text.endswith(f" home: {title}")


def test_a_template_of_ones_own(tmp_path):
    templates = templates_from(
        tmp_path,
        user="Ärzte {{sic}} {number}/{number}\n{scenarios}\n{user}\n\n ",
        scenario="{scenarios}\n{{{scenario}",
    )
    found = prompt(history((0, "x")), templates=templates)
    assert found.text.startswith("Ärzte {sic} 3/3\n- home: ")
    assert found.text.endswith("\nhome: x")
    first = scenario_prompts(texts.schema(), STATISTICS, templates)[0]
    assert first.text[first.own_start - 2 : first.own_start + 6] == "\n{home: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{scenarios} {users}", r"unknown placeholder \{users\}; there are \{number\}, \{scenarios\}, \{user\}$"),
        ("{scenarios} {scenario}", r"unknown placeholder \{scenario\}"),
        ("{scenarios} {} {user}", r"unknown placeholder \{\}"),
        ("{scenarios!r} {user}", r"unknown placeholder \{scenarios!r\}"),
        ("{scenarios} {user:>9}", r"unknown placeholder \{user:>9\}"),
        ("{scenarios.name} {user}", r"unknown placeholder \{scenarios\.name\}"),
        ("{user}", r"the placeholder \{scenarios\} is missing"),
        ("", r"the placeholder \{scenarios\} is missing"),
        ("{scenarios}", r"the placeholder \{user\} has to stand once, at the very end"),
        ("{scenarios} {user} Summarise.", r"the placeholder \{user\} has to stand once, at the very end"),
        ("{user} {scenarios} {user}", r"the placeholder \{user\} has to stand once, at the very end"),
        ("{user} {scenarios}", r"the placeholder \{user\} has to stand once, at the very end"),
        ("{scenarios} { {user}", r"write \{\{ or \}\} where a brace itself is meant"),
        ("{scenarios} } {user}", r"write \{\{ or \}\} where a brace itself is meant"),
    ],
)
def test_faulty_templates_name_file_and_placeholder(text, message, tmp_path):
    with pytest.raises(ValueError, match=r"user\.txt \(prompts\.user_template\): .*" + message):
        templates_from(tmp_path, user=text)


def test_templates_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.txt \(prompts\.scenario_template\): cannot be read .*UTF-8"):
        Templates.load(PromptConfig(scenario_template=tmp_path / "absent.txt"))
    (tmp_path / "latin.txt").write_bytes("Ä {scenarios} {user}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt \(prompts\.user_template\): cannot be read"):
        Templates.load(PromptConfig(user_template=tmp_path / "latin.txt"))


def test_the_version_is_that_of_the_texts(tmp_path):
    own = Templates.load(OWN).digest
    assert own == Templates.load(OWN).digest
    one = templates_from(tmp_path, user="{scenarios} {user}").digest
    assert one != own
    assert templates_from(tmp_path, user="{scenarios} {user}\n").digest == one
    assert templates_from(tmp_path, user="{scenarios}. {user}").digest != one
