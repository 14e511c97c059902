"""What an export says of itself: to LLaMA-Factory, to axolotl, and to people.

A licence is what the user says it is. Where nobody says, the card says that nobody did.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
"""Size categories of the hub, by the number of rows that is too many for each."""
LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    },
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "alpaca": {
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    },
}
"""Entries of dataset_info.json; prompt-completion of messages is not among its formats."""
AXOLOTL: dict[str, list[str]] = {
    "messages": [
        "type: chat_template",
        "field_messages: messages",
        'roles_to_train: ["assistant"]',
    ],
    "sharegpt": [
        "type: chat_template",
        "field_messages: conversations",
        "message_property_mappings:",
        "  role: from",
        "  content: value",
        'roles_to_train: ["gpt"]',
    ],
    "alpaca": ["type: alpaca"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is said of an export.

    scored, graded: the identities that the files of INPUT name, if any. selection: the result of
    the selection that wrote INPUT, and selected_by its command, if one did. left_out: rows by
    reason. versions: of what exported.
    """

    name: str
    format: str
    num_rows: int
    command: str
    columns: Sequence[str]
    seed: int | None = None
    licence: str | None = None
    sources: Sequence[str] = ()
    scored: Mapping[str, Any] = field(default_factory=dict)
    graded: Mapping[str, Any] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)
    selected_by: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    ids: str = ""
    version: str = ""


def dataset_info(card: Card) -> str | None:
    """LLaMA-Factory's dataset_info.json; None where it has no such format."""
    entry = LLAMA_FACTORY.get(card.format)
    if entry is None:
        return None
    columns = dict(entry["columns"])
    for name in ("system", "tools", "history"):
        if name in card.columns:
            columns[name] = name
    told = {"file_name": "train.jsonl", **entry, "columns": columns}
    return json.dumps({card.name: told}, indent=2) + "\n"


def axolotl_config(card: Card) -> str | None:
    """What to put into an axolotl configuration; None where it has no such format."""
    lines = AXOLOTL.get(card.format)
    if lines is None:
        return None
    head = [
        "# Paste into an axolotl configuration; path is this folder's train.jsonl.",
        "datasets:",
    ]
    first, *others = ["path: train.jsonl", "ds_type: json", *lines]
    return "\n".join([*head, f"  - {first}", *(f"    {line}" for line in others)]) + "\n"


def readme(card: Card) -> str:
    """The data-set card of the Hugging Face hub."""
    return "\n".join([*_front_matter(card), "", *_text(card)]) + "\n"


def _front_matter(card: Card) -> list[str]:
    size = next((name for limit, name in SIZES if card.num_rows < limit), "n>10M")
    licence = [f"license: {json.dumps(card.licence)}"] if card.licence else []
    return [
        "---",
        *licence,
        "task_categories:",
        "- text-generation",
        "size_categories:",
        f"- {size}",
        "tags:",
        "- rsr-engine",
        "configs:",
        "- config_name: default",
        "  default: true",
        "  data_files:",
        "  - split: train",
        "    path: data/train-*.parquet",
        "- config_name: scores",
        "  data_files:",
        "  - split: train",
        "    path: scores.parquet",
        "---",
    ]


def _text(card: Card) -> list[str]:
    lines = [f"# {card.name}", "", f"{card.num_rows:,} rows in the format `{card.format}`."]
    order = "as in the selection" if card.seed is None else f"shuffled with seed {card.seed}"
    lines += [f"Order: {order}. `id`: {card.ids}.", "", "## Licence and sources", ""]
    lines += [
        f"Licence: `{card.licence}`, as whoever exported this said."
        if card.licence
        else "No licence was stated. Those of the sources, the teachers and the student hold."
    ]
    lines += [f"- {source}" for source in card.sources] or ["Sources: not stated."]
    lines += ["", "## How it was made", ""]
    lines += _provenance(card)
    lines += ["", "## Counts", ""]
    names = {
        "num_rows": "rows of the pool",
        "num_scored": "of them scored",
        "num_candidates": "of them candidates",
        "num_groups": "problems with candidates",
        "num_kept": "rows kept by the selection",
    }
    lines += [
        f"- {label}: {card.selection[k]:,}" for k, label in names.items() if k in card.selection
    ]
    lines += [f"- exported: {card.num_rows:,}"]
    lines += [f"- left out, {count:,}: {reason}" for reason, count in card.left_out.items()]
    lines += [
        "",
        "## Files",
        "",
        "- `data/train-*.parquet`, `train.jsonl`: the rows, twice; nothing but what is trained on",
        "- `scores.parquet`: what else is known of each row, by `id`",
    ]
    if dataset_info(card) is not None:
        lines += ["- `dataset_info.json`: for LLaMA-Factory; `axolotl.yaml`: for axolotl"]
    return lines


def _provenance(card: Card) -> list[str]:
    lines = []
    if card.scored:
        settings, model = card.scored.get("settings", {}), card.scored.get("model", {})
        lines += [f"- student: `{settings.get('model', 'unknown')}`"]
        lines += [f"  - {name}: `{value}`" for name, value in sorted(model.items())]
        lines += [
            "- metric: Rank-Surprisal Ratio (arXiv 2601.14249), "
            f"r_max {settings.get('rank_clip') or 'none'}, {settings.get('dtype', 'unknown')}"
        ]
        lines += _versions("scored", card.scored)
    if card.graded:
        verifier = card.graded.get("settings", {}).get("verifier", "unknown")
        lines += [f"- answers graded by: `{verifier}`", *_versions("graded", card.graded)]
    if card.selected_by:
        lines += [f"- selected by: `{card.selected_by}`"]
    return [*lines, f"- exported by: `{card.command}`, rsr-engine {card.version}"]


def _versions(what: str, identity: Mapping[str, Any]) -> list[str]:
    versions = identity.get("versions") or {}
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return [f"- {what} with: {told}"] if told else []
