"""Models, adapters, tokenizers, data sets and tasks whose files reach out: nothing outside is read, asked or run."""

import ctypes
import json
import os
import shutil
import socket
import struct
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from mrd_ray.config import DataSettings, ModelSettings
from mrd_ray.data import tasks
from mrd_ray.data.read import rows
from mrd_ray.errors import UserError
from mrd_ray.evaluation import judges
from mrd_ray.models import load
from mrd_ray.models.files import model_digest, parts, weight_files

ASKED: list[str] = []  # of the network, since the last test began
IMPORTED: list[str] = []
HOST = "canary.invalid"


def _listen(event: str, args: tuple) -> None:
    if event == "socket.getaddrinfo" or (event == "socket.connect" and args[0].family != socket.AF_UNIX):
        ASKED.append(f"{event} {args[-1 if event == 'socket.connect' else 0]}")
    elif event == "import" and args[0] == "canary_code":
        IMPORTED.append(args[0])


sys.addaudithook(_listen)


@pytest.fixture
def outside(tmp_path, tiny_model_dir, monkeypatch):
    """A folder that nobody may read from: it holds a model and data. The code beside it may not run."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "outside")
    (folder / "data.jsonl").write_text('{"text": "a secret"}\n')
    datasets.Dataset.from_dict({"text": ["a secret"]}).save_to_disk(folder / "saved")
    shutil.copyfile(next((folder / "saved").glob("*.arrow")), folder / "data.arrow")
    (tmp_path / "canary_code.py").write_text("class C:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    ASKED.clear()
    IMPORTED.clear()
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    for place in (folder, folder / "saved"):
        assert libc.inotify_add_watch(watch, os.fsencode(place), 0x1 | 0x20) > 0  # accessed, opened
    yield folder
    assert opened(watch) == []
    assert (ASKED, IMPORTED) == ([], [])
    os.close(watch)


def opened(watch: int) -> list[str]:
    """Names of the files that were opened since the watch began."""
    try:
        content = os.read(watch, 1 << 16)
    except BlockingIOError:
        return []
    names, at = [], 0
    while at < len(content):
        *_, length = struct.unpack_from("iIII", content, at)
        names.append(content[at + 16 : at + 16 + length].rstrip(b"\0").decode() or ".")
        at += 16 + length
    return names


@pytest.mark.parametrize("name", ["config.json", "saved/state.json"])
def test_the_watch_sees(tmp_path, tiny_model_dir, name):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode((folder / name).parent), 0x1 | 0x20) > 0
    (folder / name).read_bytes()
    assert Path(name).name in opened(watch)
    os.close(watch)


def names_outside(folder: Path) -> dict[str, object]:
    """Names that reach out: each must be refused wherever a file may name something."""
    return {
        "credentials": f"s3://bucket/model?endpoint_override={HOST}&scheme=http",
        "http": f"http://{HOST}/model",
        "copy": f"file://{folder}",
        "reference": f"reference::file://{folder}/data.jsonl",
        "zip": f"zip://data.jsonl::file://{folder}/data.zip",
        "simplecache": f"simplecache::file://{folder}",
        "absolute": str(folder),
        "up": "../outside",
        "home": "~root",
        "nul": "outside\0",
    }


NAMES = list(names_outside(Path("/")))


def everything(model: ModelSettings) -> None:
    """All that is done with a model before and while it is scored."""
    for use in (
        model_digest,
        load.skeleton,
        load.unused_weights,
        load.load_tokenizer,
        lambda one: load.load_model(one, torch.device("cpu")),
    ):
        with pytest.raises(UserError) as refused:
            use(model)
        assert str(refused.value).startswith("model.")


@pytest.mark.parametrize("name", [*NAMES, "beside", "number"])
def test_an_adapter_that_names_its_base(outside, tmp_path, name):
    named = names_outside(outside) | {"beside": "outside", "number": 3}  # beside: in the working directory
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": named[name]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    everything(ModelSettings(path=str(tmp_path / "adapter")))


def test_the_base_that_an_adapter_may_not_name_is_given_by_hand(tmp_path, tiny_model_dir):
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model_dir), "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"say so: --model.base {tiny_model_dir}$"):
        parts(ModelSettings(path=str(tmp_path / "adapter")))
    given = ModelSettings(path=str(tmp_path / "adapter"), base=str(tiny_model_dir))
    assert parts(given).base == tiny_model_dir
    shutil.copytree(tiny_model_dir, tmp_path / "adapter" / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "base"})
    )
    assert parts(ModelSettings(path=str(tmp_path / "adapter"))).base == tmp_path / "adapter" / "base"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_that_names_weights(outside, tmp_path, tiny_model_dir, kind, name):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / ("part.safetensors" if kind.startswith("model") else kind))
    place = f"{names_outside(outside)[name]}/model.safetensors"
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    for use in (weight_files, lambda one: load.load_model(one, torch.device("cpu"))):
        with pytest.raises(UserError, match=r"model\.path"):
            use(ModelSettings(path=str(folder), allow_pickle=True))


def changed(folder: Path, name: str, **settings) -> Path:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoConfig": "evil/code--canary_code.C", "AutoModelForCausalLM": "evil/code--canary_code.C"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:canary"},
        {"experts_implementation": "evil/kernel"},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 1e300},
        {"num_labels": 10**12},
        {"num_attention_heads": 10**15},
        {"transformers_weights": "../outside/model.safetensors"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        nested(100_000),
        '{"vocab_size": ' + "9" * 10_000 + "}",
        "[" * 100_000,
        "",
        "\xff",
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_a_config_that_reaches_out(outside, tmp_path, tiny_model_dir, settings):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    if isinstance(settings, str):
        (folder / "config.json").write_text(settings, encoding="latin-1")
    else:
        changed(folder, "config.json", **settings)
    for use in (load.skeleton, lambda one: load.load_model(one, torch.device("cpu"))):
        with pytest.raises(UserError, match=r"model\.path"):
            use(ModelSettings(path=str(folder), trust_remote_code="auto_map" in settings))


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "tokenizer_file", "spm_file", "model_file"])
@pytest.mark.parametrize("place", ["{outside}/tokenizer.json", "../outside/tokenizer.json"])
def test_a_tokenizer_that_names_files(outside, tmp_path, tiny_model_dir, key, place):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    changed(folder, "tokenizer_config.json", **{key: place.format(outside=outside)})
    with pytest.raises(UserError, match=rf"model\.tokenizer: .*tokenizer_config\.json, {key}"):
        load.load_tokenizer(ModelSettings(path=str(tiny_model_dir), tokenizer=str(folder)))


def test_what_a_tokenizer_was_once_made_from_does_no_harm(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    changed(folder, "tokenizer_config.json", tokenizer_file="/home/somebody/tokenizer.json", name_or_path="s3://x/y")
    assert load.load_tokenizer(ModelSettings(path=str(folder))).eos_token == "</s>"


@pytest.mark.parametrize("shape", [list, dict])
def test_a_tokenizer_with_code_from_elsewhere(outside, tmp_path, tiny_model_dir, shape):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    classes = ["evil/code--canary_code.C", None]
    changed(folder, "tokenizer_config.json", auto_map=classes if shape is list else {"AutoTokenizer": classes})
    given = {"path": str(tiny_model_dir), "tokenizer": str(folder)}
    with pytest.raises(UserError, match=r"model\.tokenizer: .*takes code from another repository"):
        load.load_tokenizer(ModelSettings(**given, trust_remote_code=True))
    load.load_tokenizer(ModelSettings(**given))  # transformers has the class


def test_a_tokenizer_s_code_is_part_of_what_it_is(tmp_path, tiny_model_dir):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "m")
    tokenizer = load.load_tokenizer(ModelSettings(path=str(folder)))
    digests = []
    for code in (None, "x = 1", "x = 2"):
        if code is not None:
            (folder / "tokenization.py").write_text(code)
        model = ModelSettings(path=str(tiny_model_dir), tokenizer=str(folder), trust_remote_code=True)
        digests.append(load.tokenizer_identity(tokenizer, model))
    assert len(set(digests)) == 3
    untrusted = ModelSettings(path=str(tiny_model_dir), tokenizer=str(folder))
    assert load.tokenizer_identity(tokenizer, untrusted) == digests[0]


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["text", "list", "splits", "data_dir"])
def test_a_card_that_names_files(outside, tmp_path, card, name, shape):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"text": "known"}\n')
    named = names_outside(outside)[name]
    of = {
        "text": {"data_files": named},
        "list": {"data_files": ["data.jsonl", f"{named}/*"]},
        "splits": {"data_files": [{"split": "train", "path": [named]}]},
        "data_dir": {"data_dir": named},
    }[shape]
    settings = yaml.safe_dump({"configs": [{"config_name": "default"} | of]})
    (folder / card).write_text(f"---\n{settings}---\n" if card == "README.md" else settings)
    with pytest.raises(UserError, match=r"data\.path"):
        list(rows(DataSettings(path=str(folder))))


@pytest.mark.parametrize("name", ["{outside}/data.arrow", "../outside/data.arrow", "s3://x/data.arrow", "a\\b", 3])
def test_a_saved_data_set_that_names_files(outside, tmp_path, name):
    datasets.Dataset.from_dict({"text": ["known"]}).save_to_disk(tmp_path / "saved")
    named = name.format(outside=outside) if isinstance(name, str) else name
    changed(tmp_path / "saved", "state.json", _data_files=[{"filename": named}])
    with pytest.raises(UserError, match=r"data\.path: .*state\.json names"):
        list(rows(DataSettings(path=str(tmp_path / "saved"))))


@pytest.mark.parametrize("name", [*NAMES, "beside"])
@pytest.mark.parametrize("place", ["data", "retain", "refusals", "sets", "embedding_model"])
def test_a_task_that_names_files(outside, tmp_path, place, name):
    (tmp_path / "tasks").mkdir()
    named = (names_outside(outside) | {"beside": "outside"})[name]
    sections = {
        "data": {"data": {"path": named}},
        "retain": {"retain": {"path": named}},
        "refusals": {"unlearning": {"refusals": f"{named}/data.jsonl"}},
        "sets": {"evaluation": {"sets": {"a": {"path": named, "prompt": "p", "response": "r"}}}},
        "embedding_model": {"evaluation": {"embedding_model": named}},
    }[place]
    file = tmp_path / "tasks" / "task.yaml"
    file.write_text(yaml.safe_dump(sections))
    if (place, name) == ("refusals", "beside"):  # a name below the task, where there is no such file
        assert tasks.load(str(file), {})["unlearning"]["refusals"] == str(file.parent / "outside" / "data.jsonl")
        return
    with pytest.raises(UserError, match="task"):
        tasks.load(str(file), {})


def test_a_task_may_not_bring_code(tmp_path):
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({"evaluation": {"zero_shot_tasks": "mine"}}))
    with pytest.raises(UserError, match=r"zero_shot_tasks, is 'mine', whose files can run code"):
        tasks.load(str(tmp_path / "task.yaml"), {})


def test_what_a_task_names_is_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "tasks" / "task.yaml"
    file.write_text(yaml.safe_dump({"data": {"path": "own.jsonl"}, "retain": {"path": "locuslab/TOFU"}}))
    sections = tasks.load("tasks/task.yaml", {})
    assert sections["data"]["path"] == "tasks/own.jsonl"
    assert sections["retain"]["path"] == "locuslab/TOFU"


@pytest.mark.parametrize(
    "module",
    [
        {"type": "canary_code.C", "path": ""},
        {"type": "os.system", "path": ""},
        {"type": "sentence_transformers.models.Transformer", "path": "../outside"},
        {"type": "sentence_transformers.models.Transformer", "path": f"http://{HOST}"},
    ],
    ids=str,
)
def test_a_sentence_embedder_that_reaches_out(outside, tmp_path, module):
    folder = tmp_path / "embedder"
    folder.mkdir()
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0"} | module]))
    with pytest.raises(UserError, match=r"evaluation\.embedding_model: .*modules\.json"):
        judges._embedder(str(folder), torch.device("cpu"))
