"""Settings: one declaration, one rule for names, and which source counts."""

import argparse
import json
import pickle
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from milliways.cluster.cli.commands.apply import wanted_values
from milliways.cluster.cli.commands.setting_flags import ALIASES, add_setting_flags, gathered_from
from milliways.cluster.cli.main import build_parser
from milliways.cluster.settings.config import ClusterConfig, WorkerSettings, config_from_tree
from milliways.cluster.settings.declaration import description_of
from milliways.cluster.settings.names import (
    changed,
    check_variables,
    declarations,
    flag_of,
    flat,
    variable_of,
)
from milliways.cluster.settings.sources import Gathered, as_toml, gather, json_schema
from milliways.wire.errors import ConfigError


def from_command_line(*arguments: str, file: Path | None = None) -> Gathered:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser)
    return gathered_from(parser.parse_args(arguments), file)


def test_flags_are_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[workers]\ncount = 4\nblock_size = 8\ncpus_each = 2\n", "utf-8")
    monkeypatch.setenv("MILLIWAYS_WORKERS__COUNT", "5")
    monkeypatch.setenv("MILLIWAYS_WORKERS__BLOCK_SIZE", "32")
    gathered = from_command_line("--workers.count", "6", file=file)
    workers = gathered.config.workers
    names = ("count", "block_size", "cpus_each", "threads_each")
    assert [getattr(workers, name) for name in names] == [6, 32, 2.0, 0]
    assert [gathered.origins[f"workers.{name}"] for name in names] == [
        "--workers.count",
        "MILLIWAYS_WORKERS__BLOCK_SIZE",
        str(file),
        "default",
    ]


def test_every_name_follows_from_table_and_field() -> None:
    assert flag_of("workers.expert_replicas") == "--workers.expert_replicas"
    assert variable_of("workers.expert_replicas") == "MILLIWAYS_WORKERS__EXPERT_REPLICAS"
    parser = argparse.ArgumentParser()
    add_setting_flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    names = [name for name, _ in declarations()]
    assert flags >= {flag_of(name) for name in names} | set(ALIASES.values())
    assert set(ALIASES) <= set(names)
    assert all(description_of(declared) for _, declared in declarations())


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("workers.count", "5", 5),
        ("workers.gpus_each", "0.5", 0.5),
        ("workers.kv_standby", "true", True),
        ("model.path", "7", "7"),
        ("workers.resources", '{"accelerator_type:H100": 0.001}', {"accelerator_type:H100": 0.001}),
    ],
)
def test_variable_and_flag_give_text_a_type(
    name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flat(from_command_line(flag_of(name), text).config)[name] == value
    monkeypatch.setenv(variable_of(name), text)
    assert flat(from_command_line().config)[name] == value


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        (("--workers", "1"), "workers.count", 1),
        (("--kv-standby",), "workers.kv_standby", True),
        (("--gpus-per-worker", "0.5"), "workers.gpus_each", 0.5),
        (("--grpc-port", "9"), "ingress.grpc_port", 9),
    ],
)
def test_shorter_flags_still_work(alias: tuple[str, ...], name: str, value: Any) -> None:
    assert flat(from_command_line(*alias).config)[name] == value


def test_fewer_workers_lower_the_replicas_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[workers]\nexpert_replicas = 3\n", "utf-8")
    assert from_command_line("--workers", "1", file=file).config.workers.expert_replicas == 1


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"workres": {}}, "workres = {}: must be one of the tables model, workers,"),
        ({"Workers": {}}, "Workers = {}: must be one of the tables"),
        ({"workers": 3}, "workers = 3: must be a table"),
        ({"workers": {"cuont": 3}}, "workers.cuont = 3: must be one of count, "),
        ({"workers": {"count": "4"}}, "workers.count = '4': must be of type int"),
        ({"workers": {"count": 2.0}}, "workers.count = 2.0: must be of type int"),
        ({"workers": {"count": True}}, "workers.count = True: must be of type int"),
        ({"workers": {"count": 0}}, "workers.count = 0: must be between 1 and 4096"),
        ({"workers": {"kv_standby": 1}}, "workers.kv_standby = 1: must be of type bool"),
        ({"workers": {"expert_replicas": 9}}, "workers.expert_replicas = 9: must be between 0 and"),
        ({"workers": {"resources": 3}}, "workers.resources = 3: must be a table"),
        ({"workers": {"resources": {"a": "x"}}}, "workers.resources.a = 'x': must be a number"),
        ({"model": {"dtype": "f"}}, "model.dtype = 'f': must be one of float32, bfloat16"),
        ({"ingress": {"min_replicas": 9}}, "ingress.max_replicas = 4: must be between 9 and 1024"),
        ({"tls": {"ca_file": "a"}}, "tls = "),
    ],
)
def test_error_names_table_field_value_and_limit(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_tree(tree)
    assert str(caught.value).startswith(says)


def test_table_made_by_code_has_the_same_limits() -> None:
    with pytest.raises(ConfigError, match=r"workers\.count = 0: must be between 1 and 4096"):
        WorkerSettings(count=0)
    with pytest.raises(ConfigError, match=r"workers\.expert_replicas = 2: must be between 0 and 1"):
        changed(config_from_tree({"workers": {"expert_replicas": 2}}), {"workers.count": 1})


@pytest.mark.parametrize("text", ["", "[workers\n", "[workers]\ncount = 'a"])
def test_file_that_is_missing_or_broken_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.toml"
    if text:
        file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="must be a readable TOML file"):
        gather(file=file)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MILLIWAYS_WORKERS__CUONT", "3", "perhaps MILLIWAYS_WORKERS__COUNT"),
        ("MILLIWAYS_WORKRES__COUNT", "3", "perhaps MILLIWAYS_WORKERS__COUNT"),
        ("MILLIWAYS_WORKERS_COUNT", "3", "must be called MILLIWAYS_WORKERS__COUNT"),
        ("milliways_workers__cuont", "3", "perhaps MILLIWAYS_WORKERS__COUNT"),
    ],
)
def test_variable_that_only_looks_like_a_setting_is_refused(
    variable: str, value: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_variables({variable: value})


def test_other_variables_are_left_alone() -> None:
    check_variables(
        {
            "MILLIWAYS_FAULTS": "1",
            "MILLIWAYS_TEST_PLATFORMS": "cpu",
            "MILLIWAYS_WORKERS__COUNT": "3",
            # Kubernetes sets these for services called milliways and milliways-ingress.
            "MILLIWAYS_SERVICE_HOST": "10.0.0.1",
            "MILLIWAYS_INGRESS_PORT": "tcp://10.0.0.1:8000",
            "OTHER__COUNT": "3",
        }
    )


def test_what_is_printed_can_be_read_again(tmp_path: Path) -> None:
    tree = {
        "model": {"path": 'a"\\b\nü\U0001f600', "name": "x"},
        "workers": {"resources": {"accelerator_type:H100": 0.001}, "count": 5},
    }
    printed = as_toml(gather(given=tree))
    assert config_from_tree(tomllib.loads(printed)) == config_from_tree(tree)
    assert "count = 5  # arguments" in printed.splitlines()
    assert "block_size = 16  # default" in printed.splitlines()


def test_schema_is_of_the_declaration() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"workers": {"count": 4}, "model": {"dtype": "bfloat16"}})
    assert not validator.is_valid({"workers": {"count": 0}})
    assert not validator.is_valid({"workers": {"cuont": 1}})
    assert not validator.is_valid({"model": {"dtype": "float16"}})


def test_settings_are_frozen_and_travel() -> None:
    config = config_from_tree({"workers": {"count": 5, "resources": {"a": 1}}})
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.workers.count = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_processes_that_receive_their_settings_load_no_pydantic() -> None:
    code = "import sys, milliways.cluster.settings.config; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_defaults_are_settings() -> None:
    assert gather().config == ClusterConfig()


def test_commands_print_the_settings_and_their_schema(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLIWAYS_WORKERS__COUNT", "5")
    for arguments in (["config", "schema"], ["serve", "--dtype", "bfloat16", "--print-config"]):
        options = build_parser(arguments[0]).parse_args(arguments)
        options.run(options)
    schema, _, printed = capsys.readouterr().out.partition("\n}\n")
    assert json.loads(schema + "}") == json_schema()
    assert 'dtype = "bfloat16"  # --model.dtype' in printed.splitlines()
    assert "count = 5  # MILLIWAYS_WORKERS__COUNT" in printed.splitlines()


def test_file_of_apply_changes_what_it_names_only(tmp_path: Path) -> None:
    running = config_from_tree({"workers": {"count": 5, "expert_replicas": 4}})
    file = tmp_path / "settings.toml"
    file.write_text("[workers]\nexpert_replicas = 5\n[ingress]\nport = 8000\n", "utf-8")
    assert wanted_values(running, file) == {"workers.expert_replicas": 5}
    file.write_text("[workers]\ncount = 3\n", "utf-8")
    with pytest.raises(ConfigError, match=r"workers\.expert_replicas = 4: must be between 0 and 3"):
        wanted_values(running, file)
