"""Words that options choose among: their synonyms mean the same everywhere, and leave no trace."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import fastddim
from fastddim import choices
from fastddim.backends import BACKENDS
from fastddim.cli import main
from fastddim.plan import SPACINGS, Update, coefficient_row

from .support.models import SmallNet

SHAPE = (2, 3, 4, 4)
S = 3
X = torch.linspace(-2, 2, 96).reshape(SHAPE)

# (option, synonym, the package's word)
SYNONYMS = [
    (option, synonym, word)
    for option, table in (
        ("prediction", choices.PREDICTION_SYNONYMS),
        ("variance", choices.VARIANCE_SYNONYMS),
        ("spacing", choices.SPACING_SYNONYMS),
    )
    for synonym, word in table.items()
]
OF_STEP = [case for case in SYNONYMS if case[0] != "spacing"]
NOISY = {"eta": 1.0, "seed": 1}


def network() -> SmallNet:
    return SmallNet().eval()


@pytest.mark.parametrize(
    ("literal", "values"),
    [
        (choices.Spacing, SPACINGS),
        (choices.SpacingSynonym, choices.SPACING_SYNONYMS),
        (choices.Variance, set(choices.VARIANCE_SYNONYMS.values())),
        (choices.VarianceSynonym, choices.VARIANCE_SYNONYMS),
        (choices.Prediction, {*choices.PREDICTION_SYNONYMS.values(), "score"}),
        (choices.PredictionSynonym, choices.PREDICTION_SYNONYMS),
        (choices.Impl, {"auto", *BACKENDS}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_types_name_what_is_taken(literal: Any, values: Any) -> None:
    assert set(get_args(literal)) == set(values)


@pytest.mark.parametrize(("option", "synonym", "word"), SYNONYMS)
def test_sample_and_sampler(option: str, synonym: str, word: str) -> None:
    net = network()
    named = fastddim.sample(net, S, shape=SHAPE, **NOISY, **{option: synonym})
    assert torch.equal(named, fastddim.sample(net, S, shape=SHAPE, **NOISY, **{option: word}))
    sampler: Any = fastddim.Sampler(net, S, shape=SHAPE, eta=1.0, **{option: synonym})
    assert torch.equal(sampler(seed=1), named)


def test_words_differ() -> None:
    """The words differ, so that the tests above can tell them apart."""
    net = network()
    for option, words in (
        ("prediction", choices.PREDICTIONS),
        ("variance", choices.VARIANCES),
        ("spacing", SPACINGS),
    ):
        drawn = [fastddim.sample(net, 7, shape=SHAPE, **NOISY, **{option: word}) for word in words]
        for i, j in product(range(len(drawn)), repeat=2):
            assert (i == j) == torch.equal(drawn[i], drawn[j])


@pytest.mark.parametrize(("option", "synonym", "word"), OF_STEP)
def test_step(option: str, synonym: str, word: str) -> None:
    def step(chosen: str) -> Tensor:
        return fastddim.step(X, X * X, 0.3, 0.7, **NOISY, **{option: chosen})

    assert torch.equal(step(synonym), step(word))


def test_a_compiled_step() -> None:
    def step(prediction: str) -> Tensor:
        return fastddim.step(X, X * X, 0.3, 0.7, prediction=prediction)  # type: ignore[arg-type]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled("v"), step("v_prediction"))


@pytest.mark.parametrize("synonym", ["eps", "v"])
def test_invert(synonym: Any) -> None:
    net, word = network(), choices.PREDICTION_SYNONYMS[synonym]
    expected = fastddim.invert(net, X, S, prediction=word)
    assert torch.equal(fastddim.invert(net, X, S, prediction=synonym), expected)
    with pytest.raises(ValueError, match="to invert from alpha_cumprod = 1, got 'sample'"):
        fastddim.invert(net, X, S, prediction="x0")


@pytest.mark.parametrize("synonym", ["x0", "v"])
def test_requests_of_a_stream(synonym: Any) -> None:
    def drawn(prediction: Any, variance: Any, spacing: Any) -> Tensor:
        stream = fastddim.Stream(network(), shape=SHAPE, prediction=prediction)
        ticket = stream.submit(S, variance=variance, spacing=spacing, **NOISY)
        stream.run()
        return ticket.result()

    word = choices.PREDICTION_SYNONYMS[synonym]
    assert torch.equal(drawn(synonym, "fixed_large", "quad"), drawn(word, "large", "quadratic"))


def test_a_run_goes_on_by_the_other_name(tmp_path: Path) -> None:
    net, out = network(), tmp_path / "run"
    named: Any = {"prediction": "v", "variance": "fixed_large", "spacing": "quad"}
    run = fastddim.generate(net, S, out, stop=3, shape=SHAPE, eta=1.0, **named)
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    assert (plan["prediction"], plan["variance"]) == ("v_prediction", "large")
    words: Any = {"prediction": "v_prediction", "variance": "large", "spacing": "quadratic"}
    again = fastddim.generate(net, S, out, stop=3, shape=SHAPE, eta=1.0, **words)
    assert (again.drawn, again.digest) == (0, run.digest)


def test_tuned_steps_are_for_the_word() -> None:
    net = network()
    tuned = fastddim.tune(
        net, S, shape=SHAPE, prediction="eps", samples=4, teacher_steps=20, progress=False
    )
    assert tuned.tuned_for.prediction == "epsilon"
    drawn = fastddim.sample(net, tuned, shape=SHAPE, seed=1)
    assert torch.equal(drawn, fastddim.sample(net, tuned, shape=SHAPE, seed=1, prediction="noise"))


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [
        ("prediction", "epsilom", "epsilon"),
        ("prediction", "V-Prediction", "v_prediction"),
        ("prediction", "EPS", "epsilon"),
        ("prediction", "pred-x0", "sample"),
        ("spacing", "trailling", "trailing"),
        ("spacing", "Uniform", "uniform"),
        ("variance", "larg", "large"),
        ("prediction", "flow", None),
        ("spacing", "linear", None),
        ("variance", 3, None),
        ("prediction", None, None),
        ("prediction", ["eps"], None),
    ],
    ids=str,
)
def test_what_is_no_word(option: str, given: Any, meant: str | None) -> None:
    words = {"prediction": choices.PREDICTIONS, "variance": choices.VARIANCES}.get(option, SPACINGS)
    with pytest.raises(ValueError, match="^" + option) as caught:
        fastddim.sample(network(), S, shape=SHAPE, **{option: given})
    hint = "" if meant is None else f"; did you mean {meant!r}?"
    listed = ", ".join(map(repr, words))
    assert str(caught.value) == f"{option}: expected one of {listed}, got {given!r}{hint}"


def test_a_synonym_outside_of_options_is_refused() -> None:
    """A synonym outside of options is refused: an unchecked row of an update would get the meaning
    of another prediction.
    """
    with pytest.raises(ValueError, match="prediction: expected that of a checked update, got 'x0'"):
        coefficient_row(0.3, 0.7, Update(prediction="x0"))


def test_the_command_line(tmp_path: Path) -> None:
    written = []
    for prediction, spacing, variance in (
        ("v", "quad", "fixed_large"),
        ("v_prediction", "quadratic", "large"),
    ):
        file = tmp_path / f"{prediction}.npz"
        options = ("--prediction", prediction, "--spacing", spacing, "--variance", variance)
        given = (
            "sample",
            "digits",
            "--seed",
            "3",
            "--steps",
            "2",
            "--eta",
            "1",
            "--out",
            str(file),
            *options,
        )
        result = CliRunner().invoke(main, given)
        assert result.exit_code == 0, result.output
        written.append(file.read_bytes())
    assert written[0] == written[1]
    result = CliRunner().invoke(main, ["sample", "digits", "--prediction", "flow"])
    assert "'flow' is not one of 'epsilon', 'sample', 'v_prediction', 'score'" in result.output
