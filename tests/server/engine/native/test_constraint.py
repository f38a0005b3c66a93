"""server.engine.native.constraint: compiled constraints, and the tokens that they allow."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_configs
import torch
from tiny import ask, injection, make_engine, tokenizer

from server.engine.errors import InvalidConstraint, QueueFull
from server.engine.native import constraint as module
from server.engine.native.constraint import Constraints, Matcher, Stuck, constrained
from server.engine.native.engine import Engine
from server.engine.request import Constraint, ConstraintKind, FinishReason, RequestOutput

END = 1  # of the tiny tokenizer
LABELS = ["the café", "the 🙂", "answers"]
CHOICE = Constraint(ConstraintKind.CHOICE, json.dumps(LABELS))
DIGITS = Constraint(ConstraintKind.REGEX, "[0-9]+")
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["the", "café"]}, "free": {"type": "boolean"}},
    "required": ["name", "free"],
    "additionalProperties": False,
}
COMPACT = {**PERSON, "x-guidance": {"whitespace_flexible": False}}
SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(COMPACT))
LARK = Constraint(ConstraintKind.GRAMMAR, 'start: "the" (" " WORD)*\nWORD: /[a-z]{2,4}/')
GBNF = Constraint(ConstraintKind.GRAMMAR, 'root ::= "yes" | "no"')


@pytest.fixture
def constraints() -> Iterator[Constraints]:
    made = Constraints(tokenizer(), frozenset({END}))
    yield made
    made.close()


def matcher(constraints: Constraints, constraint: Constraint, **options: Any) -> Matcher:
    return constraints.matcher(constraint, frozenset({END}), **{"ignore_eos": False, **options})


def allowed(found: Matcher) -> set[int]:
    return set(found.allowed().nonzero()[0].tolist())


def after(found: Matcher, text: str) -> Matcher:
    """The matcher after a text, each of whose tokens it has allowed."""
    for token in tokenizer().encode(text):
        assert token in allowed(found)
        found.accept(token)
    return found


# What is no constraint ---------------------------------------------------------------------------

INVALID = {
    "an open group": Constraint(ConstraintKind.REGEX, "(a|b"),
    "look-ahead": Constraint(ConstraintKind.REGEX, "a(?=b)"),
    "nothing matches": Constraint(ConstraintKind.REGEX, "[a&&b]"),
    "half a surrogate pair": Constraint(ConstraintKind.REGEX, "\ud800"),
    "no JSON": Constraint(ConstraintKind.JSON_SCHEMA, "{"),
    "no such type": Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "text"}'),
    "an unsupported keyword": Constraint(ConstraintKind.JSON_SCHEMA, '{"not": {}}'),
    "no value": Constraint(ConstraintKind.JSON_SCHEMA, "false"),
    "a dangling reference": Constraint(ConstraintKind.JSON_SCHEMA, '{"$ref": "#/nowhere"}'),
    "no grammar": Constraint(ConstraintKind.GRAMMAR, "hello"),
    "an unknown rule": Constraint(ConstraintKind.GRAMMAR, "start: other"),
    "too deep": Constraint(ConstraintKind.GRAMMAR, "root ::= " + "(" * 5000),
    "too many symbols": Constraint(
        ConstraintKind.JSON_SCHEMA, '{"type": "array", "items": {}, "maxItems": 100000}'
    ),
    "too long": Constraint(ConstraintKind.REGEX, "a" * (module.MAX_SOURCE + 1)),
}


@pytest.mark.parametrize("name", INVALID)
async def test_what_is_no_constraint_is_refused_with_field_and_reason(
    constraints: Constraints, name: str
) -> None:
    with pytest.raises(InvalidConstraint) as caught:
        await constraints.check(INVALID[name])
    assert caught.value.field == "constraint"
    assert caught.value.message.startswith("constraint: ")
    assert len(caught.value.message) < 400


async def test_a_refusal_names_the_field_of_this_request(constraints: Constraints) -> None:
    for field in ("guided_regex", "structured_outputs.regex"):
        with pytest.raises(InvalidConstraint, match=f"^{field}: .*unclosed group"):
            await constraints.check(Constraint(ConstraintKind.REGEX, "(a|b", field))


async def test_a_grammar_that_nests_as_deep_as_the_limit_allows_does_not_end_the_process(
    constraints: Constraints,
) -> None:
    rules = [f'r{i}: "(" r{i + 1} ")"' for i in range(2000)]
    source = "\n".join(["start: r0", *rules, 'r2000: "x"'])
    deep = Constraint(ConstraintKind.GRAMMAR, source)
    await constraints.check(deep)
    assert "(" in {tokenizer().decode([token]) for token in allowed(matcher(constraints, deep))}


async def test_only_so_many_constraints_wait_to_be_compiled(
    constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    checks = [
        constraints.check(Constraint(ConstraintKind.REGEX, f"a{{{number}}}"))
        for number in range(1, 4)
    ]
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(each) for each in results] == [type(None), type(None), QueueFull]
    await constraints.check(DIGITS)


# What is allowed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
def test_every_label_may_be_spelled_and_only_then_the_answer_ends(
    constraints: Constraints, label: str
) -> None:
    found = matcher(constraints, CHOICE)
    assert END not in allowed(found)
    assert allowed(after(found, label)) == {END}


def test_an_answer_may_end_wherever_the_grammar_may(constraints: Constraints) -> None:
    found = after(matcher(constraints, LARK), "the")
    assert END in allowed(found)
    assert END not in allowed(after(found, " c"))
    assert END in allowed(after(found, "af"))


def test_with_ignore_eos_the_end_is_allowed_only_where_nothing_else_is(
    constraints: Constraints,
) -> None:
    goes_on = after(matcher(constraints, DIGITS, ignore_eos=True), "12")
    assert END not in allowed(goes_on)
    assert allowed(after(matcher(constraints, GBNF, ignore_eos=True), "no")) == {END}


def test_every_end_token_of_the_sequence_ends_it(constraints: Constraints) -> None:
    found = constraints.matcher(GBNF, frozenset({END, 0}), ignore_eos=False)
    assert allowed(after(found, "yes")) == {END, 0}


def test_a_token_against_the_grammar_leaves_the_sequence_stuck(constraints: Constraints) -> None:
    found = matcher(constraints, DIGITS)
    found.allowed()
    found.accept(tokenizer().encode("a")[0])
    with pytest.raises(Stuck, match="cannot go on under its constraint"):
        found.allowed()


def test_masked_logits_keep_allowed_ones_and_free_rows_bit_for_bit(
    constraints: Constraints,
) -> None:
    found = matcher(constraints, DIGITS)
    logits = torch.randn(3, tiny_configs.VOCAB + 20)  # a model may have more rows than tokens
    before = logits.clone()
    masked = constrained(logits, [None, found, None])
    assert torch.equal(logits, before)
    assert torch.equal(masked[[0, 2]], logits[[0, 2]])
    kept = masked[1].isfinite().nonzero()[:, 0].tolist()
    assert set(kept) == allowed(found)
    assert torch.equal(masked[1, kept], logits[1, kept])
    assert constrained(logits, [None] * 3) is logits


def test_a_row_without_a_finite_logit_left_is_stuck(constraints: Constraints) -> None:
    found = matcher(constraints, DIGITS)
    logits = torch.zeros(1, tiny_configs.VOCAB)
    logits[0, list(allowed(found))] = -torch.inf
    with pytest.raises(Stuck, match="rules out every token"):
        constrained(logits, [found])


# In the engine -----------------------------------------------------------------------------------


def engine(**options: Any) -> Engine:
    made, _ = make_engine(injection(), {}, **options)
    made.stop_ids = frozenset({END})
    return made


def run(made: Engine, *requests: Any) -> dict[tuple[str, int], RequestOutput]:
    """Run requests to their ends; each sequence's last output, with its whole text."""
    for request in requests:
        made.add(request)
    texts: dict[tuple[str, int], str] = {}
    last: dict[tuple[str, int], RequestOutput] = {}
    while made.scheduler.unfinished():
        for output in made.step():
            key = (output.request_id, output.index)
            texts[key] = texts.get(key, "") + output.text
            last[key] = output
    made.check_integrity()
    made.constraints.close()
    return {key: with_text(output, texts[key]) for key, output in last.items()}


def with_text(output: RequestOutput, text: str) -> RequestOutput:
    return RequestOutput(
        output.request_id,
        output.index,
        text=text,
        finish_reason=output.finish_reason,
        error=output.error,
        completion_tokens=output.completion_tokens,
    )


def is_json_of_person(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"name", "free"} and value["name"] in ("the", "café")


CASES = [
    (CHOICE, lambda text: text in LABELS),
    (SCHEMA, is_json_of_person),
    (GBNF, lambda text: text in ("yes", "no")),
    (LARK, lambda text: re.fullmatch(r"the( [a-z]{2,4})*", text) is not None),
]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_answer_keeps_to_its_constraint(case: int, temperature: float) -> None:
    constraint, is_right = CASES[case]
    options = {"temperature": temperature, "seed": 3, "n": 4, "max_tokens": 80}
    outputs = run(engine(), ask("r", constraint=constraint, **options))
    for output in outputs.values():
        if output.finish_reason is FinishReason.STOP:
            assert is_right(output.text), output.text
    assert FinishReason.STOP in {output.finish_reason for output in outputs.values()}
    assert FinishReason.ERROR not in {output.finish_reason for output in outputs.values()}


def test_a_preempted_sequence_goes_on_where_it_was_in_its_grammar() -> None:
    options = {"temperature": 1.0, "seed": 1, "max_tokens": 60, "constraint": SCHEMA}
    prompts = [tuple(range(5, 5 + length)) for length in (30, 31, 32, 33)]
    requests = [ask(f"r{i}", prompt=prompt, **options) for i, prompt in enumerate(prompts)]
    alone = {}
    for request in requests:
        alone.update(run(engine(), request))
    crowded = engine(num_blocks=16, max_model_len=120, prefix_caching=False)
    together = run(crowded, *requests)
    assert crowded.counters.num_preemptions
    assert together == alone
    assert all(is_json_of_person(output.text) for output in together.values())


def test_log_probabilities_are_those_of_the_unmodified_distribution() -> None:
    made = engine()
    made.add(ask("r", constraint=CHOICE, logprobs=5, max_tokens=2))
    outputs = []
    while made.scheduler.unfinished():
        outputs += made.step()
    made.constraints.close()
    first = outputs[0].logprobs[0]
    free = engine()
    free.add(ask("r", logprobs=5, max_tokens=1))
    expected = free.step()[0].logprobs[0]
    assert first.top == expected.top


def test_a_sequence_that_is_stuck_ends_with_its_reason_and_its_neighbours_go_on() -> None:
    free = ask("free", max_tokens=8)
    expected = run(engine(), free)["free", 0]
    made = engine()
    broken = ask("broken", constraint=DIGITS, max_tokens=8)
    made.add(broken)
    found = next(iter(made.scheduler.waiting)).matcher
    assert found is not None
    found.allowed()
    found.accept(tokenizer().encode("a")[0])
    outputs = run(made, free)
    assert outputs["free", 0] == expected
    ended = outputs["broken", 0]
    assert ended.finish_reason is FinishReason.ERROR
    assert "cannot go on under its constraint" in str(ended.error)


# Special tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_end|>b", "<|im_start|>"])
def test_a_special_token_that_a_constraint_spells_is_text(
    constraints: Constraints, text: str
) -> None:
    """It was the token itself: the answer ended there, or could not go on."""
    found = matcher(constraints, Constraint(ConstraintKind.CHOICE, json.dumps([text])))
    spelled = tokenizer().encode(text, add_special_tokens=False, split_special_tokens=True)
    for token in spelled:
        assert token in allowed(found)
        assert END not in allowed(found)
        found.accept(token)
    assert allowed(found) == {END}


def test_json_is_written_without_free_whitespace(constraints: Constraints) -> None:
    schema = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
    found = after(matcher(constraints, Constraint(ConstraintKind.JSON_SCHEMA, schema)), "{")
    (close,) = tokenizer().encode("}")
    assert allowed(found) == {close}
