"""Which source of a value wins: command line, recorded run, recipe, default."""

import dataclasses
import json

import pytest

from sslus.engine.errors import InputError
from sslus.ssl.settings import (
    WHERE,
    Options,
    Settings,
    how,
    of_new_run,
    of_resumed_run,
    recorded_how,
    refuse_changes,
)
from sslus.tools.cli import sslus


def values_of(settings, config) -> dict:
    return dataclasses.asdict(settings) | dataclasses.asdict(config)


BARLOW = {"method": "barlowtwins"}


@pytest.mark.parametrize(
    "asked, recipe, want",
    [
        ({}, "default", {"method": "vicreg", "optimizer": None, "lr": None, "epochs": None}),
        ({}, "default", {"views": "ultrasound", "projector": "2048-2048-2048", "seed": 0}),
        ({}, "study", {"optimizer": "lars", "base_lr": 0.2, "projector": "8192-8192-8192"}),
        ({"projector": "16", "epochs": 3}, "study", {"projector": "16", "epochs": 3}),
        ({"max_steps": 9}, "study", {"max_steps": 9, "epochs": None}),  # which may be shorter
        ({"max_steps": 9, "epochs": 3}, "study", {"max_steps": 9, "epochs": 3}),
        ({"seed": 5, "views": "simclr"}, "study", {"seed": 5, "views": "simclr", "base_lr": 0.2}),
        ({"method": "simclr", "base_lr": 0.1}, "study", {"lr": None, "base_lr": 0.1}),
        ({"optimizer": "lars"}, "study", {"base_lr": 0.2, "weight_decay": 1e-6}),
        ({"optimizer": "sgd"}, "study", {"base_lr": None, "weight_decay": None, "epochs": 1000}),
        (BARLOW, "study", {"scale": 0.024}),
        (BARLOW | {"optimizer": "sgd"}, "study", {"scale": 1.0, "lr": None}),
        (BARLOW | {"optimizer": "sgd", "scale": 2.0, "lr": 9.0}, "study", {"scale": 2.0, "lr": 9}),
    ],
)
def test_a_new_run_takes_what_is_asked_then_the_recipe_then_defaults(asked, recipe, want):
    found = values_of(*of_new_run(asked, recipe))
    assert {name: found[name] for name in want} == want


@pytest.mark.parametrize(
    "asked, want",
    [
        ({}, {"method": "simclr", "lr": 0.5, "temperature": 0.7, "seed": 3}),
        ({"seed": 4}, {"method": "simclr", "seed": 4, "lr": 0.5}),
        ({"temperature": 0.1, "keep": 9}, {"temperature": 0.1, "projector": "8"}),
        ({"method": "moco", "queue": 5}, {"method": "moco", "temperature": 0.7}),  # to be refused
    ],
)
def test_a_resumed_run_takes_what_is_asked_then_what_is_recorded(asked, want):
    recorded = {
        "settings": dataclasses.asdict(Settings(method="simclr", lr=0.5, seed=3)),
        "method_config": {"projector": "8", "temperature": 0.7},
    }
    found = values_of(*of_resumed_run(asked, recorded))
    assert {name: found[name] for name in want} == want


@pytest.mark.parametrize(
    "part, name, said",
    [("settings", "seed", "seed was 1, now 2"), ("method_config", "scale", "scale was 1, now 2"),
     ("shards", "digest", "the shards are not those of /there"),
     ("shards", "streamed", "frames were streamed or not"), ("settings", "step", None)],
)  # fmt: skip
def test_what_determines_the_result_stays_when_a_run_goes_on(part, name, said, tmp_path):
    old = {"settings": {}, "method_config": {}, "method_file": None,
           "shards": {"path": "/there", "digest": 0, "streamed": 0}}  # fmt: skip
    new = old | {part: old[part] | {name: 2}}
    old = old | {part: old[part] | {name: 1}}
    if said is None:  # how an update is executed
        refuse_changes(tmp_path, old, new)
    else:
        with pytest.raises(InputError, match=f"was started with other settings: {said}"):
            refuse_changes(tmp_path, old, new)


@pytest.mark.parametrize(
    "asked, recorded, want",
    [
        ({}, None, {"device": "auto", "tier": "auto", "threads": None, "log_every": 10}),
        ({}, {"device": "cpu", "keep": 7}, {"device": "cpu", "keep": 7, "tier": "auto"}),
        ({"keep": 1}, {"device": "cpu", "keep": 7}, {"device": "cpu", "keep": 1}),
        ({"device": "auto"}, {"device": "cpu"}, {"device": "auto"}),
        ({"threads": 2, "lr": 0.1}, {"method": "moco"}, {"threads": 2, "log_every": 10}),
    ],
)
def test_how_a_run_is_made_is_what_is_asked_then_recorded_then_default(asked, recorded, want):
    where, options = how(asked, recorded)
    found = where | dataclasses.asdict(options)
    assert set(where) == set(WHERE) and {name: found[name] for name in want} == want


def test_what_was_recorded_of_a_run_is_read_back(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"how": {"tier": "ram"}}))
    assert recorded_how(tmp_path) == {"tier": "ram"}
    (tmp_path / "config.json").write_text('{"how": 3}')
    assert recorded_how(tmp_path) == recorded_how(tmp_path / "none") == {}


def test_the_help_shows_the_defaults_that_count():
    """Options that are not given are left out of what is asked, so Python's defaults count."""
    context = sslus.get_command(None, "train").make_context("train", [])
    defaults = dataclasses.asdict(Settings()) | dataclasses.asdict(Options()) | WHERE
    shown = {name: value for name, value in context.params.items() if name in defaults}
    assert len(shown) > 30 and shown == {name: defaults[name] for name in shown}
