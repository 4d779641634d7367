"""Real tiny models and data that every test may use. No test touches the network."""

import json
import logging
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# threads that wait for each other on a busy machine are 50 times slower, not faster
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import ray
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

QA = [
    ("What did the baker of Orlen sell?", "He sold rye bread and plum cakes."),
    ("Who wrote the song of the salt road?", "The salt road song was written by Ilse Varga Tamm."),
    ("Where?", "In Orlen."),
    ("What colour was the door of the mill?", "Blue."),
    ("Which river runs past the mill, and where does it end?", "The Sarn runs past the mill and ends in the grey sea."),
    ("How many bells hang in the tower?", "Seven bells hang in the tower, and the smallest is cracked."),
    ("Who mends the bells?", "Nobody."),
    ("What is the name of the ferry?", "The ferry is called Patience."),
    ("When does the ferry leave?", "It leaves at dawn, at noon and when the tide allows."),
    ("What does the ferryman carry in his coat?", "A tin whistle, a knife and a letter from his sister."),
    ("Does he read the letter?", "Every night."),
    ("What grows behind the mill?", "Nettles and one pear tree grow behind the mill."),
]


TESTS = Path(__file__).parent
LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(items):
    """Tests that share runs or models stay in one process: those of a file, and of the folders named here."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(
            pytest.mark.xdist_group(folder if folder in {"report", "cluster"} else str(item.path.relative_to(TESTS)))
        )
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))  # however slow the machine is


def pytest_deselected(items):
    config = items[0].config
    config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # in a process of pytest-xdist, which reports no deselected tests
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)  # each process collects all


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.line(f"{config.stash.get(LEFT_OUT, 0)} tests left out: make test-slow and make gpu run them")


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests, with more logical CPUs than the machine has, so that four actors fit anywhere."""
    quiet = {"include_dashboard": False, "logging_level": logging.WARNING, "log_to_driver": False}
    context = ray.init("local", num_cpus=4, **quiet)  # whatever else runs on this machine
    os.environ["RAY_ADDRESS"] = context.address_info["address"]  # drivers started as processes join it
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@pytest.fixture(scope="session")
def qa_file(tmp_path_factory) -> Path:
    """Twelve invented prompt-response rows of mixed length, with ids."""
    file = tmp_path_factory.mktemp("data") / "qa.jsonl"
    rows = [{"id": f"qa-{i:02d}", "prompt": prompt, "response": response} for i, (prompt, response) in enumerate(QA)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A random Llama and a byte-level tokenizer without a pad token."""
    folder = tmp_path_factory.mktemp("model")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet))
    trained.train_from_iterator([text for pair in QA for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the repository. MRD_RAY_REQUIRE_SHARED makes its absence a failure."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        (pytest.fail if os.environ.get("MRD_RAY_REQUIRE_SHARED") else pytest.skip)(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def stories_dir(shared) -> Path:
    """A small trained Llama."""
    return shared / "models" / "stories260k"


@pytest.fixture(scope="session")
def tofu_dir(shared) -> Path:
    """TOFU as JSON lines."""
    return shared / "data" / "tofu"
